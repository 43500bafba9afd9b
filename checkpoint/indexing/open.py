"""Finds a checkpoint's index: our own, or else stock's."""

from __future__ import annotations

import errno
import os
import stat

import numpy as np
from xxhash import xxh3_64_intdigest

from ckptd.checkpoint.directory import Opener
from ckptd.checkpoint.image.frame import METADATA_HASH
from ckptd.checkpoint.indexing.columns import Index
from ckptd.checkpoint.indexing.index import decode_index
from ckptd.checkpoint.names import INDEX_NAME, METADATA_NAME
from ckptd.checkpoint.stock.metadata_unpickle import decode_metadata
from ckptd.checkpoint.system import closed_at_end, named
from ckptd.protocol.errors import BadIndex, CkptdError, UnknownCheckpoint


def read_index(path: str, *, opener: Opener | None = None) -> Index:
    """Return the index of the checkpoint in a directory.

    Args:
        path: The directory.
        opener: How its files are opened; by path if left out.

    Returns:
        What ``.ckptd`` says; what stock's ``.metadata`` says where there is no such file, or an older one that stock
        has saved over.

    Raises:
        UnknownCheckpoint: There is neither; check the checkpoint id.
        BadIndex: It is there but cannot be read or trusted.
        Unsupported: A stock checkpoint whose files were transformed; load it with torch.
        SystemCallFailed: It is there but the system does not let us read it.
    """
    ours, stock = f"{path}/{INDEX_NAME}", f"{path}/{METADATA_NAME}"
    data = _read(ours, opener)
    metadata = _read(stock, opener)
    if data is None and metadata is None:
        raise UnknownCheckpoint(path)
    if data is None:
        return decode_metadata(metadata or b"", stock)
    index = decode_index(data, ours)
    if metadata is not None and not is_metadata_of(index, metadata) and _is_another_save(index, metadata, stock):
        return decode_metadata(metadata, stock)
    return index


def is_metadata_of(index: Index, metadata: bytes) -> bool:
    """Return whether the bytes of ``.metadata`` are those that were written with this index."""
    return index.header.get(METADATA_HASH) == f"{xxh3_64_intdigest(metadata):016x}"


def _is_another_save(index: Index, metadata: bytes, path: str) -> bool:
    """Return whether stock has saved over our checkpoint, which leaves our index behind; or else bits have turned."""
    try:
        found = decode_metadata(metadata, path)
    except CkptdError:
        return False  # damaged: our own index has its own hash and stands
    # One wrong bit changes the name of the save or a place, never both; another save has another of each.
    same_places = found.names == index.names and np.array_equal(
        np.sort(found.record_offset), np.sort(index.record_offset)
    )
    return found.header.get("save_id") != index.header.get("save_id") and not same_places


def _read(path: str, opener: Opener | None) -> bytes | None:
    """Return a file's bytes, or None if it is not there. A pipe or device would keep a reader for ever."""

    def read() -> bytes | None:
        try:
            descriptor = (opener or os.open)(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError):
            return None
        with closed_at_end(descriptor, path):
            mode = os.fstat(descriptor).st_mode
            if stat.S_ISDIR(mode):
                raise IsADirectoryError(errno.EISDIR, path)
            if not stat.S_ISREG(mode):
                raise BadIndex(path, "it is not a file")
            with open(descriptor, "rb", closefd=False) as file:
                return file.read()

    return named("read", path, read)
