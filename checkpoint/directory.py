"""A checkpoint's directory, opened: a commit that takes its name meanwhile does not mix another save into what is read.

A published directory is never written into, only exchanged by name, so what is opened through one descriptor is of one
save. Stock does write into a directory that is there: that is seen afterwards, by what the files look like then.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Final

from ckptd.protocol.errors import SystemCallFailed, UnknownCheckpoint

Opener = Callable[[str, int], int]
"""Opens a path with flags of open(2), as :func:`os.open` does."""

# What tells a file from one that has taken its place, or from itself after a write.
_Look = tuple[int, int, int]
_FLAGS: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


class CheckpointDirectory:
    """An opened directory; its files are opened by the same paths as ever, but through it.

    Args:
        path: Absolute path of the checkpoint.

    Raises:
        UnknownCheckpoint: There is no such directory.
        SystemCallFailed: It cannot be opened.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, _FLAGS)
        except (FileNotFoundError, NotADirectoryError):
            raise UnknownCheckpoint(path) from None
        except OSError as error:
            raise SystemCallFailed("open", path, error.errno or errno.EIO) from None
        self._seen: dict[str, _Look] = {}

    def __enter__(self) -> CheckpointDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def open(self, path: str, flags: int) -> int:
        """Open a file of the checkpoint, whose path begins with the directory's. Raises OSError."""
        name = path.removeprefix(self.path).lstrip("/")
        descriptor = os.open(name, flags | os.O_CLOEXEC, dir_fd=self._descriptor)
        self._seen.setdefault(name, _look(os.fstat(descriptor)))
        return descriptor

    def has_lost_its_name(self) -> bool:
        """Return whether the path no longer leads here: another checkpoint has taken the place, or it was removed."""
        try:
            return not os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        except OSError:
            return True

    def was_written_into(self) -> bool:
        """Return whether a file that was opened is another one now: what was read may be of two saves.

        A directory that has lost its name is being removed; nobody writes into it, and what is open stays.
        """
        return not self.has_lost_its_name() and any(self._look_again(name) != look for name, look in self._seen.items())

    def _look_again(self, name: str) -> _Look | None:
        try:
            return _look(os.stat(name, dir_fd=self._descriptor))
        except OSError:
            return None


def _look(stat: os.stat_result) -> _Look:
    return (stat.st_ino, stat.st_size, stat.st_mtime_ns)
