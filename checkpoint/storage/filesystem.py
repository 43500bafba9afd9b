"""``FileSystemWriter`` and ``FileSystemReader``: checkpoints in directories, for ckptd and for stock's functions."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint._extension import ExtensionRegistry as StockExtensionRegistry
from torch.distributed.checkpoint.filesystem import _StorageInfo

from ckptd.checkpoint.formats.record import tensor_in_record
from ckptd.checkpoint.reading.read import READERS, Read, read_all
from ckptd.checkpoint.stock.metadata import torch_dtype
from ckptd.checkpoint.storage import hidden_directory
from ckptd.checkpoint.storage.claim import Claim
from ckptd.checkpoint.storage.extensions import StreamTransformExtension, resolve_extensions
from ckptd.checkpoint.storage.folder_store import FolderStore
from ckptd.checkpoint.storage.fresh_names import FreshNames
from ckptd.checkpoint.storage.hidden_directory import HiddenDirectory
from ckptd.checkpoint.storage.known_payloads import Known
from ckptd.checkpoint.storage.options import SerializationFormat, WriterOptions
from ckptd.checkpoint.storage.publication import Publication
from ckptd.checkpoint.storage.reader import CheckpointReader
from ckptd.checkpoint.storage.writer import CheckpointWriter
from ckptd.protocol.errors import BadIndex, SaveAborted, TruncatedFile, Unsupported

__all__ = ["FileSystemReader", "FileSystemWriter", "SerializationFormat"]


class FileSystemWriter(CheckpointWriter):
    """Writes a checkpoint into a directory that appears, whole and durable, at the end of the save.

    Arguments and protocol are those of :class:`torch.distributed.checkpoint.FileSystemWriter`; what differs is what
    a failure leaves behind: nothing. An existing checkpoint is replaced in one step, never written into.

    Args:
        path: The directory.
        single_file_per_rank: Each thread of a rank writes one file; otherwise each item gets its own.
        sync_files: Make files durable before they are published.
        thread_count: How many files a rank writes at a time.
        per_thread_copy_ahead: Bytes copied from an accelerator ahead of being written.
        cache_staged_state_dict: `async_save` keeps its copy of the state dict for the next save.
        overwrite: Whether an existing checkpoint may be replaced.
        _extensions: What transforms the records, or its name (``"stream.zstd"``).
        serialization_format: ``TORCH_SAVE`` records, or ``SAFETENSORS`` files.

    Raises:
        Unsupported: A value that no writer could honour.
        UnknownExtension: An extension's name that is not registered.
    """

    def __init__(  # noqa: PLR0917  # torch's signature
        self,
        path: str | os.PathLike[str],
        single_file_per_rank: bool = True,
        sync_files: bool = True,
        thread_count: int = 1,
        per_thread_copy_ahead: int = 10_000_000,
        cache_staged_state_dict: bool = False,
        overwrite: bool = True,
        _extensions: Sequence[StreamTransformExtension | str] | None = None,
        serialization_format: SerializationFormat = SerializationFormat.TORCH_SAVE,
    ) -> None:
        options = WriterOptions(
            single_file_per_rank=single_file_per_rank,
            sync_files=sync_files,
            thread_count=thread_count,
            copy_ahead_bytes=per_thread_copy_ahead,
            extensions=resolve_extensions(_extensions),
            serialization_format=serialization_format,
        )
        super().__init__(as_path(path), options, cache_staged_state_dict=cache_staged_state_dict, overwrite=overwrite)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Get ready for another save; see :meth:`CheckpointWriter.reset`."""
        super().reset(as_path(checkpoint_id) if checkpoint_id else None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether this is the path of a directory that could be made here."""
        if isinstance(checkpoint_id, Path):
            return True
        text = os.fspath(checkpoint_id)
        if "://" in text:
            return False
        return any(os.access(parent, os.W_OK) for parent in Path(text).absolute().parents if parent.exists())

    def _exists(self, name: str) -> bool:
        return os.path.lexists(os.path.join(self.path, name))

    def _begin(self, save_id: str, *, prefix: str) -> Claim:
        token = hidden_directory.token_of(save_id)
        publication = self._publication(token, prefix=prefix)
        if not isinstance(publication, HiddenDirectory):
            return Claim(token, publication)
        hidden_directory.sweep(publication.path)
        return Claim(token, publication, lock=hidden_directory.begin(publication.directory))

    def _publication(self, token: str, *, prefix: str) -> Publication:
        path = os.path.realpath(self.path)
        if self._alone:
            return FreshNames(FolderStore(path, sync=self.sync_files), token, prefix=prefix)
        return HiddenDirectory(path, token, prefix=prefix, sync=self.sync_files)

    def _token_anew(self) -> str:
        path = os.path.realpath(self.path)
        token = hidden_directory.find_token(path)
        if token is None:
            raise SaveAborted(path)
        return token


class FileSystemReader(CheckpointReader):
    """Reads a checkpoint from a directory, in parallel, verifying hashes where it has some.

    Args:
        path: The directory.
        _extension_registry: Finds the extensions that transformed it; ours if left out.
        thread_count: How many ranges are read at a time.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        _extension_registry: StockExtensionRegistry | None = None,
        *,
        thread_count: int = READERS,
    ) -> None:
        super().__init__(as_path(path), _extension_registry, thread_count=thread_count)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Get ready for another load."""
        super().reset(as_path(checkpoint_id) if checkpoint_id else None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether this can be the path of a directory; it need not be writable."""
        return isinstance(checkpoint_id, Path) or "://" not in os.fspath(checkpoint_id)

    def _read_file(self, name: str) -> bytes | None:
        return FolderStore(os.fspath(self.path), sync=False).read(name)

    def _read_ranges(self, reads: list[Read]) -> None:
        read_all(reads, threads=self.thread_count)

    def _location(self, name: str) -> str:
        return os.path.join(self.path, name)

    def _locate(self, place: _StorageInfo, file: str) -> Known | None:
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None  # the read will tell
        try:
            found = tensor_in_record(descriptor, file, place.offset, place.length)
        except (BadIndex, TruncatedFile, Unsupported):
            return None  # torch.load may know more, or says what is wrong
        finally:
            os.close(descriptor)
        dtype = torch_dtype(found.dtype)
        nbytes = math.prod(found.shape) * dtype.itemsize
        return Known(found.data_offset, nbytes, None, dtype, found.shape) if found.is_contiguous else None


def as_path(checkpoint_id: str | os.PathLike[str] | Any) -> Path:
    """Return an id as a path. Raises Unsupported if it is none."""
    text = os.fspath(checkpoint_id)
    if not text or "\0" in text:
        raise Unsupported(f"checkpoint id {text!r}", "give the path of a directory")
    if "://" in text:
        raise Unsupported(f"checkpoint id {text!r} for a file system", "use FsspecWriter and FsspecReader")
    return Path(text)
