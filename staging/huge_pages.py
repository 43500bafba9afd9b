"""Brings a file on tmpfs into huge pages, whatever its mount says, where the kernel can.

Huge pages are a property of the file, not of the mapping that made them: the trainer's copies into an arena, the
worker's O_DIRECT writes out of it and loads from memory all go by 2 MiB then. Measured for 1 GB on 2 cores of a virtual
machine: 0.17 instead of 0.27 s for the first touch, O_DIRECT writes at 0.011 instead of 0.046 CPU-seconds, pread(2) at
13 instead of 4.6 GB/s.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
from concurrent.futures import ThreadPoolExecutor
from typing import Final

logger = logging.getLogger(__name__)

HUGE_BYTES: Final = 2 << 20  # of x86-64 and of arm64 with pages of 4 KiB; others say no
_MADV_COLLAPSE: Final = 25  # Linux 6.1, asm-generic/mman-common.h; works on tmpfs mounted huge=never, too: madvise(2)
_PROT_NONE: Final = 0
_MAP_FIXED: Final = 0x10  # asm-generic/mman-common.h; Python 3.11 has no name for it
_MAP_FAILED: Final = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def bring_into_huge_pages(descriptor: int, size: int, *, threads: int) -> bool:
    """Gather a file's pages into huge ones, before they are touched; what they hold stays.

    Args:
        descriptor: The file, open for reading and writing.
        size: Its size in bytes; what does not fill a huge page stays as it is.
        threads: How many work at it.

    Returns:
        Whether all of it is in huge pages now. If not, nothing but speed is lost.
    """
    if size < HUGE_BYTES:
        return False
    # The address must be congruent to the offset in the file, and nobody but mmap(2) itself can be asked for that.
    room = size + HUGE_BYTES
    base = _libc.mmap(None, room, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if base == _MAP_FAILED:
        return False
    try:
        begin = -(-base // HUGE_BYTES) * HUGE_BYTES
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        if _libc.mmap(begin, size, protection, mmap.MAP_SHARED | _MAP_FIXED, descriptor, 0) == _MAP_FAILED:
            return False
        return _collapse(begin, size // HUGE_BYTES, threads)
    finally:
        _libc.munmap(base, room)


def _collapse(begin: int, count: int, threads: int) -> bool:
    share = -(-count // threads)

    def collapse(first: int) -> int:
        length = min(share, count - first) * HUGE_BYTES
        if _libc.madvise(begin + first * HUGE_BYTES, length, _MADV_COLLAPSE) == 0:
            return 0
        return ctypes.get_errno()

    with ThreadPoolExecutor(threads) as pool:
        failures = [error for error in pool.map(collapse, range(0, count, share)) if error]
    if failures:  # an older kernel, or memory in pieces
        logger.debug("no huge pages for an arena: errno %s", failures)
    return not failures
