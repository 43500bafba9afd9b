"""Short rows of a file, copied out of a mapping: a system call for each would cost more than its bytes.

Invariant: an error of the disk, or a file that was cut, is never a SIGBUS: pages are populated by a call that can fail
before anybody looks at them. What the matter is the caller learns by reading in the ordinary way.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import threading
from typing import Final

import numpy as np

from ckptd.checkpoint.columns import Int64

# Linux 5.14. Source: include/uapi/asm-generic/mman-common.h.
_MADV_POPULATE_READ: Final = 22

_libc = ctypes.CDLL(None)  # unlike mmap.madvise() it lets other threads run meanwhile


class MappedFile:
    """A file's bytes, mapped when they are first wanted.

    Args:
        descriptor: The file, open for reading until :meth:`close`.
        file_bytes: Its size.
    """

    def __init__(self, descriptor: int, file_bytes: int) -> None:
        self._descriptor, self._file_bytes = descriptor, file_bytes
        self._mapping: mmap.mmap | None = None
        self._lock = threading.Lock()

    def copy_rows(self, begins: Int64, row_bytes: int, target: memoryview) -> bool:
        """Copy equally long rows into a target, one behind the other; return False if they cannot be had so.

        Args:
            begins: int64[R], offsets in the file, ascending.
            row_bytes: Length of each row.
            target: ``R * row_bytes`` bytes.
        """
        mapping = self._map()
        if mapping is None:
            return False
        data = np.frombuffer(mapping, np.uint8)
        first, end = int(begins[0]), int(begins[-1]) + row_bytes
        if not self._populate(data, first, end):
            return False
        rows = np.frombuffer(target, np.uint8).reshape(len(begins), row_bytes)
        steps = np.diff(begins)
        edges = [0, *(np.flatnonzero(np.diff(steps)) + 2).tolist(), len(begins)]
        for low, high in itertools.pairwise(edges):  # runs of rows that are equally far apart
            stride = int(begins[low + 1] - begins[low]) if high - low > 1 else row_bytes
            window = data[int(begins[low]) : int(begins[high - 1]) + row_bytes]
            rows[low:high] = np.lib.stride_tricks.as_strided(window, (high - low, row_bytes), (stride, 1))
        return True

    def _map(self) -> mmap.mmap | None:
        with self._lock:
            if self._mapping is None:
                with contextlib.suppress(OSError, ValueError):  # ValueError: the file is shorter by now
                    self._mapping = mmap.mmap(self._descriptor, self._file_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
            return self._mapping

    def _populate(self, data: np.ndarray[tuple[int], np.dtype[np.uint8]], begin: int, end: int) -> bool:
        first = begin // mmap.PAGESIZE * mmap.PAGESIZE
        address = int(data.__array_interface__["data"][0]) + first
        done: int = _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(end - first), _MADV_POPULATE_READ)
        return done == 0

    def close(self) -> None:
        """Let the mapping go; pages that somebody still copies from keep it."""
        self._mapping = None
