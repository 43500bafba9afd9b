"""The few Linux calls that Python has no name for, and system calls whose failure names call and path."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final, TypeVar

from ckptd.protocol.errors import SystemCallFailed

_libc = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD: Final = -100
_RENAME_NOREPLACE: Final = 1
_RENAME_EXCHANGE: Final = 2
_UNSUPPORTED: Final = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}

T = TypeVar("T")


def named(call: str, path: str, function: Callable[[], T]) -> T:
    """Run ``function``; an OSError becomes SystemCallFailed with the call's name and the path."""
    try:
        return function()
    except OSError as error:
        raise SystemCallFailed(call, path, error.errno or errno.EIO) from None


@contextmanager
def closed_at_end(descriptor: int, path: str) -> Iterator[None]:
    """Close a descriptor at the end of a block. Raises SystemCallFailed, unless the block has raised already."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            os.close(descriptor)
        raise
    try:
        os.close(descriptor)
    except InterruptedError:
        pass  # it is closed all the same. Source: close(2), "Dealing with error returns from close()"
    except OSError as error:
        raise SystemCallFailed("close", path, error.errno or errno.EIO) from None


def preallocate(descriptor: int, nbytes: int, path: str) -> None:
    """Reserve a file's blocks, where the file system can; glibc's emulation, which writes them, is not used.

    Raises:
        SystemCallFailed: No room, or another failure that a write would meet too.
    """
    while _libc.fallocate(descriptor, 0, ctypes.c_long(0), ctypes.c_long(nbytes)) != 0:
        number = ctypes.get_errno()
        if number == errno.EINTR:
            continue
        if number in _UNSUPPORTED:
            return
        raise SystemCallFailed("fallocate", path, number)


def _rename(source: str, target: str, flags: int) -> bool:
    result = _libc.renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags)
    if result == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise SystemCallFailed("rename", target, number)


def rename_new(source: str, target: str) -> bool:
    """Rename, failing with EEXIST if the target exists; False where the file system cannot do that."""
    return _rename(source, target, _RENAME_NOREPLACE)


def rename_exchange(one: str, other: str) -> bool:
    """Exchange two names in one step; False where the file system cannot do that."""
    return _rename(one, other, _RENAME_EXCHANGE)


def sync_directory(path: str) -> None:
    """Make the names in a directory durable: without it a new *name* may be lost. Source: fsync(2), NOTES."""
    descriptor = named("open", path, lambda: os.open(path, os.O_RDONLY | os.O_DIRECTORY))
    with closed_at_end(descriptor, path):
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system that has nothing to sync in directories, as fsync(2) says
                raise SystemCallFailed("fsync", path, error.errno or errno.EIO) from None


def write_file(path: str, data: bytes) -> None:
    """Write a small new file and make its bytes durable; the directory is the caller's to sync."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = named("open", path, lambda: os.open(path, flags, 0o666))
    with closed_at_end(descriptor, path):
        rest = memoryview(data)
        while rest:
            rest = rest[named("write", path, lambda rest=rest: os.write(descriptor, rest)) :]  # type: ignore[misc]
        named("fsync", path, lambda: os.fsync(descriptor))
