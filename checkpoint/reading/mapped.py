"""Short rows of a file, copied out of a mapping: a system call for each would cost more than its bytes.

Invariant: an error of the disk, or a file that was cut, is never a SIGBUS: pages are populated by a call that can fail
before anybody looks at them. What the matter is the caller learns by reading in the ordinary way.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import platform
import re
import threading
from typing import Final

import numpy as np

from ckptd.checkpoint.indexing.columns import Int64, UInt8
from ckptd.checkpoint.reading.blocks import BLOCK_BYTES

# Linux 5.14. Source: include/uapi/asm-generic/mman-common.h.
_MADV_POPULATE_READ: Final = 22

# Since then a fault in a mapping that is advised so reads a whole large block. Source: do_sync_mmap_readahead().
_LARGE_BLOCKS_SINCE: Final = (5, 18)

_libc = ctypes.CDLL(None)  # unlike mmap.madvise() it lets other threads run meanwhile


class MappedFile:
    """A file's bytes, mapped when they are first wanted.

    Args:
        descriptor: The file, open for reading until :meth:`close`.
        file_bytes: Its size.
    """

    def __init__(self, descriptor: int, file_bytes: int) -> None:
        self._descriptor, self._file_bytes = descriptor, file_bytes
        self._data: UInt8 | None = None
        self._is_large = False
        self._lock = threading.Lock()

    def brings_large_blocks(self) -> bool:
        """Return whether the first look at a byte that is not cached brings its large block, as one page if it can be.

        Where it does not, the caller has to ask for the bytes ahead.
        """
        self._map()
        return self._is_large

    def copy_rows(self, begins: Int64, row_bytes: int, target: memoryview) -> bool:
        """Copy equally long rows into a target, one behind the other; return False if they cannot be had so.

        Args:
            begins: int64[R], offsets in the file, ascending.
            row_bytes: Length of each row.
            target: ``R * row_bytes`` bytes.
        """
        data = self._map()
        if data is None:
            return False
        first, end = int(begins[0]), int(begins[-1]) + row_bytes
        if not self._populate(data, first, end):
            return False
        rows = np.frombuffer(target, np.uint8).reshape(len(begins), row_bytes)
        steps = np.diff(begins)
        edges = [0, *(np.flatnonzero(np.diff(steps)) + 2).tolist(), len(begins)]
        for low, high in itertools.pairwise(edges):  # runs of rows that are equally far apart
            stride = int(steps[low]) if high - low > 1 else row_bytes
            rows[low:high] = np.ndarray((high - low, row_bytes), np.uint8, data, int(begins[low]), (stride, 1))
        return True

    def _map(self) -> UInt8 | None:
        with self._lock:
            if self._data is None:
                with contextlib.suppress(OSError, ValueError):  # ValueError: the file is shorter by now
                    mapping = mmap.mmap(self._descriptor, self._file_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
                    self._is_large = _ask_for_large_blocks(mapping)
                    self._data = np.frombuffer(mapping, np.uint8)
            return self._data

    def _populate(self, data: UInt8, begin: int, end: int) -> bool:
        first = begin // mmap.PAGESIZE * mmap.PAGESIZE
        address = int(data.__array_interface__["data"][0]) + first
        done: int = _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(end - first), _MADV_POPULATE_READ)
        return done == 0

    def close(self) -> None:
        """Let the mapping go; pages that somebody still copies from keep it."""
        self._data = None


def _ask_for_large_blocks(mapping: mmap.mmap) -> bool:
    """Have faults bring a large block each and nothing behind it; return whether the kernel will.

    Measured, rows of 1.3 KiB from every 4 KiB: asked for ahead, in pages of 4 KiB, a file took 600 ms a GB and 0.34
    CPU-seconds; in large blocks 260 ms and 0.05. Copied again, from the page cache, 97 ms and 20.
    """
    if mmap.PAGESIZE != BLOCK_BYTES or _kernel_version() < _LARGE_BLOCKS_SINCE:
        return False
    try:
        mapping.madvise(mmap.MADV_HUGEPAGE)
        mapping.madvise(mmap.MADV_RANDOM)
    except OSError:  # a kernel that was built without them
        return False
    return True


def _kernel_version() -> tuple[int, ...]:
    found = re.match(r"(\d+)\.(\d+)", platform.release())
    return tuple(map(int, found.groups())) if found else (0, 0)
