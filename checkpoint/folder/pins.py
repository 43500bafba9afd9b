"""Pins: a file ``.pinned`` in a checkpoint's directory, which retention leaves alone for as long as it is there.

In the directory rather than beside it, so that a pin moves, ends and is copied with its checkpoint, and survives any
daemon. Saving over a pinned checkpoint keeps the pin, as it keeps whatever else users have put there.
"""

from __future__ import annotations

import os

from ckptd.checkpoint.folder.locks import reading
from ckptd.checkpoint.names import INDEX_NAME, METADATA_NAME, PIN_NAME
from ckptd.checkpoint.system import named, sync_directory, write_file
from ckptd.protocol.errors import UnknownCheckpoint


def pin(path: str) -> None:
    """Pin a checkpoint, durably. Raises UnknownCheckpoint, SystemCallFailed."""
    with reading(path):  # a removal that is about to begin would not see the pin
        if not any(os.path.lexists(os.path.join(path, name)) for name in (INDEX_NAME, METADATA_NAME)):
            raise UnknownCheckpoint(path)
        write_file(os.path.join(path, PIN_NAME), b"")
        sync_directory(path)


def unpin(path: str) -> None:
    """Take the pin away; that there is none is no error. Raises SystemCallFailed."""

    def unlink() -> None:
        try:
            os.unlink(os.path.join(path, PIN_NAME))
        except FileNotFoundError:
            return
        sync_directory(path)

    named("unlink", os.path.join(path, PIN_NAME), unlink)


def is_pinned(path: str) -> bool:
    """Return whether a checkpoint is pinned."""
    return os.path.lexists(os.path.join(path, PIN_NAME))
