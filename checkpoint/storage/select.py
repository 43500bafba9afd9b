"""Which back-end an id or a storage object of stock's means."""

from __future__ import annotations

import inspect
import os
from typing import Any

from torch.distributed.checkpoint import filesystem as stock

from ckptd.checkpoint.storage.filesystem import FileSystemReader, FileSystemWriter
from ckptd.checkpoint.storage.objects import FsspecReader, FsspecWriter
from ckptd.protocol.errors import Unsupported

Writer = FileSystemWriter | FsspecWriter
Reader = FileSystemReader | FsspecReader

_STOCK_FSSPEC = ("torch.distributed.checkpoint.fsspec_filesystem", "torch.distributed.checkpoint._fsspec_filesystem")


def writer_for(checkpoint_id: str | os.PathLike[str], **options: Any) -> Writer:
    """Return the writer for an id: of the file system for paths and ``file://``, of object stores for other URLs.

    Args:
        checkpoint_id: A path or a URL.
        options: As the writer takes them.

    Raises:
        TypeError: An option that the writer does not take.
        Unsupported: Nothing stores under such an id.
    """
    path = local_path(checkpoint_id)
    return FsspecWriter(checkpoint_id, **options) if path is None else FileSystemWriter(path, **options)


def reader_for(checkpoint_id: str | os.PathLike[str], **options: Any) -> Reader:
    """Return the reader for an id; see :func:`writer_for`."""
    path = local_path(checkpoint_id)
    return FsspecReader(checkpoint_id, **options) if path is None else FileSystemReader(path, **options)


def local_path(checkpoint_id: str | os.PathLike[str]) -> str | None:
    """Return the path that an id means on this machine, or None if it is the URL of something else."""
    text = os.fspath(checkpoint_id)
    if not isinstance(text, str):
        raise Unsupported(f"checkpoint id {text!r}", "give a string or a path")
    if "://" not in text:
        return text
    scheme, _, rest = text.partition("://")
    if scheme not in {"file", "local"} or "::" in text:
        return None
    return rest if rest.startswith("/") else f"/{rest}"


def as_ours(storage: Any) -> Writer | Reader:
    """Return our back-end with the options of one of stock's; one of ours as it is.

    Args:
        storage: A ``FileSystem``- or ``FsspecWriter`` or ``-Reader``, of torch or of ours.

    Raises:
        Unsupported: A class of somebody else's, subclasses of stock's included: they may do anything.
    """
    if isinstance(storage, Writer | Reader):
        return storage
    kind = type(storage)
    if kind is stock.FileSystemWriter:
        return FileSystemWriter(storage.path, **_writer_options(storage))
    if kind is stock.FileSystemReader:
        return FileSystemReader(storage.path, storage.transforms.extension_registry)
    if kind.__module__ in _STOCK_FSSPEC and kind.__name__ == "FsspecWriter":
        return FsspecWriter(storage.path, **_writer_options(storage), **_store_options(storage, FsspecWriter))
    if kind.__module__ in _STOCK_FSSPEC and kind.__name__ == "FsspecReader":
        registry = storage.transforms.extension_registry
        return FsspecReader(storage.path, _extension_registry=registry, **_store_options(storage, FsspecReader))
    raise Unsupported(f"storage {kind.__qualname__}", "give one of torch's or ckptd's own")


def _writer_options(writer: Any) -> dict[str, Any]:
    return {
        "single_file_per_rank": writer.single_file_per_rank,
        "sync_files": writer.sync_files,
        "thread_count": writer.thread_count,
        "per_thread_copy_ahead": writer.per_thread_copy_ahead,
        "cache_staged_state_dict": writer.cache_staged_state_dict,
        "overwrite": writer.overwrite,
        "_extensions": writer.transforms.extensions,
        "serialization_format": writer.serialization_format,
    }


def _store_options(storage: Any, kind: type[Any]) -> dict[str, Any]:
    """Return the options that stock has handed to fsspec, which keeps them."""
    taken = set(inspect.signature(kind.__init__).parameters)
    return {name: value for name, value in storage.fs.fs.storage_options.items() if name not in taken}
