"""``FsspecWriter`` and ``FsspecReader``: checkpoints in object stores, for our own saves and for stock's functions."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint._extension import ExtensionRegistry as StockExtensionRegistry

from ckptd.checkpoint.reading.read import Read, read_all
from ckptd.checkpoint.storage.claim import Claim
from ckptd.checkpoint.storage.extensions import StreamTransformExtension, resolve_extensions
from ckptd.checkpoint.storage.fresh_names import FreshNames, Store
from ckptd.checkpoint.storage.object_source import ObjectSource
from ckptd.checkpoint.storage.object_store import ObjectStore, open_file_system, store_for
from ckptd.checkpoint.storage.options import SerializationFormat, WriterOptions
from ckptd.checkpoint.storage.publication import Publication
from ckptd.checkpoint.storage.reader import CheckpointReader
from ckptd.checkpoint.storage.writer import CheckpointWriter
from ckptd.protocol.errors import Unsupported

__all__ = ["FsspecReader", "FsspecWriter"]


class FsspecWriter(CheckpointWriter):
    """Writes a checkpoint into an object store, where it appears with its last object, ``.metadata``.

    Arguments and protocol are those of torch's ``FsspecWriter``. Objects are uploaded in parallel, large ones in parts,
    and compared with what was sent. Each save has object names of its own, so that an overwrite never mixes two; the
    old objects go when the new ``.metadata`` is there. A save that fails removes its objects and aborts its uploads.

    Args:
        path: The id, a URL such as ``s3://bucket/run/step-100``; kept as it is, ``//`` included.
        single_file_per_rank: Each thread of a rank writes one object; otherwise each item gets its own.
        sync_files: Make files durable, where the place is a local directory; stores are durable in any case.
        thread_count: How many objects a rank writes at a time.
        per_thread_copy_ahead: Bytes copied from an accelerator ahead of being written.
        overwrite: Whether an existing checkpoint may be replaced.
        _extensions: What transforms the records, or its name (``"stream.zstd"``).
        serialization_format: ``TORCH_SAVE`` records, or ``SAFETENSORS`` files.
        cache_staged_state_dict: `async_save` keeps its copy of the state dict for the next save.
        **kwargs: Options of the store, as fsspec names them.

    Raises:
        TypeError: An option that the store does not know.
        Unsupported: A value that no writer could honour, or a store whose package is not installed.
    """

    def __init__(  # torch's signature
        self,
        path: str | os.PathLike[str],
        single_file_per_rank: bool = True,
        sync_files: bool = True,
        thread_count: int = 1,
        per_thread_copy_ahead: int = 10_000_000,
        overwrite: bool = True,
        _extensions: Sequence[StreamTransformExtension | str] | None = None,
        serialization_format: SerializationFormat = SerializationFormat.TORCH_SAVE,
        *,
        cache_staged_state_dict: bool = False,
        **kwargs: Any,
    ) -> None:
        options = WriterOptions(
            single_file_per_rank=single_file_per_rank,
            sync_files=sync_files,
            thread_count=thread_count,
            copy_ahead_bytes=per_thread_copy_ahead,
            extensions=resolve_extensions(_extensions),
            serialization_format=serialization_format,
        )
        url = as_url(path)
        self.storage_options = kwargs
        self._fs = open_file_system(url, kwargs, caller=type(self).__name__)
        super().__init__(url, options, cache_staged_state_dict=cache_staged_state_dict, overwrite=overwrite)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Get ready for another save; the store's options stay."""
        super().reset(as_url(checkpoint_id) if checkpoint_id else None)
        if checkpoint_id:
            self._fs = open_file_system(self.url, self.storage_options, caller=type(self).__name__)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether fsspec has a store for this id."""
        return has_store(checkpoint_id)

    @property
    def url(self) -> str:
        """The id as text."""
        return os.fspath(self.path)

    def _store(self) -> Store:
        return store_for(self.url, self._fs, sync=self.sync_files)

    def _exists(self, name: str) -> bool:
        return self._store().size(name) is not None

    def _begin(self, save_id: str, *, prefix: str) -> Claim:
        return Claim(save_id, self._publication(save_id, prefix=prefix))

    def _publication(self, token: str, *, prefix: str) -> Publication:
        return FreshNames(self._store(), token, prefix=prefix)

    def _token_anew(self) -> str:
        return str(uuid.uuid4())  # names only have to differ: the results tell them to the coordinator


class FsspecReader(CheckpointReader):
    """Reads a checkpoint from an object store, in parallel, verifying hashes where it has some.

    Args:
        path: The id, a URL; kept as it is.
        _extension_registry: Finds the extensions that transformed it; ours if left out.
        thread_count: How many ranges are read at a time.
        **kwargs: Options of the store, as fsspec names them.

    Raises:
        TypeError: An option that the store does not know.
        Unsupported: A store whose package is not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        _extension_registry: StockExtensionRegistry | None = None,
        thread_count: int = 16,
        **kwargs: Any,
    ) -> None:
        url = as_url(path)
        self.storage_options = kwargs
        self._fs = open_file_system(url, kwargs, caller=type(self).__name__)
        super().__init__(url, _extension_registry, thread_count=thread_count)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Get ready for another load; the store's options stay."""
        super().reset(as_url(checkpoint_id) if checkpoint_id else None)
        if checkpoint_id:
            self._fs = open_file_system(self.url, self.storage_options, caller=type(self).__name__)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether fsspec has a store for this id."""
        return has_store(checkpoint_id)

    @property
    def url(self) -> str:
        """The id as text."""
        return os.fspath(self.path)

    def _store(self) -> Store:
        return store_for(self.url, self._fs, sync=False)

    def _read_file(self, name: str) -> bytes | None:
        return self._store().read(name)

    def _read_ranges(self, reads: list[Read]) -> None:
        store = self._store()
        source = ObjectSource(store) if isinstance(store, ObjectStore) else None
        read_all(reads, threads=self.thread_count, source=source)

    def _location(self, name: str) -> str:
        return self._store().url(name)


def as_url(checkpoint_id: str | os.PathLike[str]) -> str:
    """Return an id as the text that it is. Raises Unsupported if it is empty."""
    text = os.fspath(checkpoint_id)
    if not text or "\0" in text:
        raise Unsupported(f"checkpoint id {text!r}", "give a URL")
    return text


def has_store(checkpoint_id: str | os.PathLike[str]) -> bool:
    """Return whether fsspec has a store for an id; a path object is the file system's."""
    if isinstance(checkpoint_id, Path):
        return False
    try:
        open_file_system(as_url(checkpoint_id), {}, caller="validate_checkpoint_id")
    except Unsupported:
        return False
    return True
