"""Locks that keep a checkpoint from being removed while it is read.

A reader holds a shared `flock` on the checkpoint's ``.ckptd`` (``.metadata`` where there is none); who wants to remove
it needs the exclusive one and does not wait. The kernel releases both with the process, however it ends. The lock is on
a file and not on the directory because NFS grants an exclusive lock only on what is open for writing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from typing import Final

from ckptd.checkpoint.names import INDEX_NAME, METADATA_NAME

# Whoever removes a checkpoint holds its lock until the name is gone, which takes milliseconds.
_PATIENCE_S: Final = 5.0
_PAUSE_S: Final = 0.01
# A pipe that lies in a file's place would keep a reader for ever.
_AT_ONCE: Final = os.O_CLOEXEC | os.O_NONBLOCK


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Hold a checkpoint while it is read.

    Where there is nothing to lock, or no lock to be had, it is read all the same: what is wrong shows then.

    Args:
        path: Its directory.
    """
    descriptor = _lock_shared(path)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def lock_for_removal(path: str) -> int | None:
    """Take the exclusive lock of a checkpoint.

    Args:
        path: Its directory.

    Returns:
        The descriptor that holds the lock; None if somebody reads the checkpoint, it is gone, or nobody can know.
    """
    for name in (INDEX_NAME, METADATA_NAME):
        file = os.path.join(path, name)
        descriptor = _open_for_writing(file)
        if descriptor is None:
            continue
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still_at(descriptor, file):
                return descriptor
        os.close(descriptor)
        return None
    return None


def _lock_shared(path: str) -> int | None:
    until = time.monotonic() + _PATIENCE_S
    for name in (INDEX_NAME, METADATA_NAME):
        file = os.path.join(path, name)
        while time.monotonic() < until:
            try:
                descriptor = os.open(file, os.O_RDONLY | _AT_ONCE)
            except OSError:
                break  # the next file may do
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                if _is_still_at(descriptor, file):
                    return descriptor
            except BlockingIOError:
                time.sleep(_PAUSE_S)  # it is being removed, or about to be left alone
            except OSError:
                os.close(descriptor)
                return None  # a file system without locks
            os.close(descriptor)
    return None


def _open_for_writing(file: str) -> int | None:
    for mode in (os.O_RDWR, os.O_RDONLY):
        try:
            return os.open(file, mode | os.O_NOFOLLOW | _AT_ONCE)
        except PermissionError:
            continue
        except OSError:
            return None
    return None


def _is_still_at(descriptor: int, file: str) -> bool:
    """Return whether a file is still the one that was opened: it may have been removed or replaced meanwhile."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except OSError:
        return False
