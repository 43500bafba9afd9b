"""How fast this machine is: a copy into shared memory, a raw write and read of a file. Short, and no benchmark."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from ckptd.checkpoint.system import named, preallocate
from ckptd.protocol.errors import SystemCallFailed
from ckptd.staging.arena import ALIGNMENT_BYTES, touch

# Four threads with 8 MiB each fill the queue of an NVMe disk: `make bench`.
_THREADS: Final = 4
_CHUNK_BYTES: Final = 8 << 20


def shared_memory(directory: str, nbytes: int) -> mmap.mmap:
    """Return touched memory of a file without a name on a tmpfs. Raises SystemCallFailed."""
    descriptor = named("open", directory, lambda: os.open(directory, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600))
    try:
        named("fallocate", directory, lambda: os.posix_fallocate(descriptor, 0, nbytes))
        memory = mmap.mmap(descriptor, nbytes)
    finally:
        os.close(descriptor)
    touch(memory, threads=2)
    return memory


def anonymous_memory(nbytes: int) -> mmap.mmap:
    """Return touched private memory, as malloc gives it to large tensors."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    touch(memory, threads=2)
    return memory


def copy_s(source: mmap.mmap, target: mmap.mmap) -> float:
    """Return the seconds of one copy between two mappings, by several cores as staging does it."""
    to, origin = (ctypes.addressof(ctypes.c_char.from_buffer(memory)) for memory in (target, source))
    nbytes = min(len(source), len(target))

    def copy(begin: int) -> None:
        ctypes.memmove(to + begin, origin + begin, min(_CHUNK_BYTES, nbytes - begin))

    return timed(lambda: _in_parallel(copy, nbytes))


def write_s(path: str, data: mmap.mmap) -> tuple[float, bool]:
    """Write a new file past the page cache and make it durable.

    Returns:
        The seconds, and whether the file system took O_DIRECT; where it does not, the page cache was used.

    Raises:
        SystemCallFailed: It cannot be written.
    """
    descriptor, direct = _open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    view = memoryview(data)

    def write(begin: int) -> None:
        end = min(begin + _CHUNK_BYTES, len(data))
        while begin < end:
            begin += os.pwrite(descriptor, view[begin:end], begin)

    def write_all() -> None:
        _in_parallel(write, len(data))
        os.fsync(descriptor)

    try:
        preallocate(descriptor, len(data), path)
        return named("write", path, lambda: timed(write_all)), direct
    finally:
        view.release()
        os.close(descriptor)


def _open(path: str, flags: int) -> tuple[int, bool]:
    """Open a file with O_DIRECT, or without where its file system refuses that."""
    flags |= os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags | os.O_DIRECT, 0o600), True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise SystemCallFailed("open", path, error.errno or 0) from None
    # Linux makes the file before it finds that O_DIRECT cannot be had, so it may be there now.
    return named("open", path, lambda: os.open(path, flags & ~os.O_EXCL, 0o600)), False


def _in_parallel(part: Callable[[int], None], nbytes: int) -> None:
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(part, range(0, nbytes, _CHUNK_BYTES)))


def timed(function: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    begun_s = time.perf_counter()
    function()
    return time.perf_counter() - begun_s


def whole_blocks(nbytes: int) -> int:
    """Return ``nbytes``, rounded up to what O_DIRECT takes."""
    return max(-(-nbytes // ALIGNMENT_BYTES), 1) * ALIGNMENT_BYTES
