"""Finds a checkpoint's index: our own, or else stock's."""

from __future__ import annotations

from pathlib import Path

from ckptd.checkpoint.columns import Index
from ckptd.checkpoint.index import decode_index
from ckptd.checkpoint.metadata_unpickle import decode_metadata
from ckptd.checkpoint.names import INDEX_NAME, METADATA_NAME
from ckptd.checkpoint.system import named
from ckptd.protocol.errors import UnknownCheckpoint


def read_index(path: str) -> Index:
    """Return the index of the checkpoint in a directory.

    Args:
        path: The directory.

    Returns:
        What ``.ckptd`` says; without such a file, what stock's ``.metadata`` says.

    Raises:
        UnknownCheckpoint: There is neither; check the checkpoint id.
        BadIndex: It is there but cannot be read or trusted.
        Unsupported: A stock checkpoint whose files were transformed; load it with torch.
        SystemCallFailed: It is there but the system does not let us read it.
    """
    for name, decode in ((INDEX_NAME, decode_index), (METADATA_NAME, decode_metadata)):
        file = f"{path}/{name}"
        data = _read(file)
        if data is not None:
            return decode(data, file)
    raise UnknownCheckpoint(path)


def _read(path: str) -> bytes | None:
    def read() -> bytes | None:
        try:
            return Path(path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    return named("read", path, read)
