"""Images that are still in shared memory, as files of their checkpoint.

They are read by calls, not through a mapping: to bring the pages of a mapping in costs as much as the copy out of it.
Measured, CPU-seconds per GB: pread 0.14; page tables 0.10 and then the copy 0.06.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence

from ckptd.checkpoint.indexing.columns import Int64
from ckptd.checkpoint.reading.files import SHORT_ROW_BYTES, TARGETS_AT_MOST
from ckptd.checkpoint.reading.mapped import MappedFile
from ckptd.protocol.errors import SystemCallFailed, TruncatedFile


class ImageFile:
    """One image. Whether it was there all the time is for the caller to find out, once all is read.

    Args:
        path: The file that it is, for errors.
        descriptor: Of the arena; the caller's to close.
        begin: Where the image begins in the arena.
        nbytes: Its length.
    """

    def __init__(self, path: str, descriptor: int, *, begin: int, nbytes: int) -> None:
        self.read_bytes = 0
        self._path, self._descriptor, self._begin, self._nbytes = path, descriptor, begin, nbytes
        self._mapped = MappedFile(descriptor, os.fstat(descriptor).st_size)
        self._lock = threading.Lock()

    def fill(self, begin: int, targets: Sequence[memoryview]) -> bool:
        """Copy a range into targets, one behind the other."""
        for first in range(0, len(targets), TARGETS_AT_MOST):
            begin += self._read(begin, targets[first : first + TARGETS_AT_MOST])
        return True

    def view(self, begin: int, end: int, bounce: memoryview) -> memoryview:
        """Return the bytes of a range, copied: in the arena they might change between the hash and the copy."""
        data = bounce[: end - begin]
        self._read(begin, [data])
        return data

    def fill_rows(self, begins: Int64, row_bytes: int, target: memoryview, *, blocks: tuple[int, int]) -> None:
        """Copy equally long ranges; short ones out of a mapping, because a call for each would cost more."""
        del blocks  # all of it is in memory: nothing has to be brought along
        self._check(int(begins[-1]) + row_bytes)
        short = row_bytes < SHORT_ROW_BYTES
        if short and self._mapped.copy_rows(begins + self._begin, row_bytes, target):
            self._count(len(target))
            return
        for row, begin in enumerate(begins.tolist()):
            self._read(begin, [target[row * row_bytes : (row + 1) * row_bytes]])

    def close(self) -> None:
        """Let the mapping go."""
        self._mapped.close()

    def _read(self, begin: int, targets: Sequence[memoryview]) -> int:
        nbytes = sum(map(len, targets))
        self._check(begin + nbytes)
        try:
            count = os.preadv(self._descriptor, targets, self._begin + begin)
        except OSError as error:
            raise SystemCallFailed("pread", self._path, error.errno or errno.EIO) from None
        if count != nbytes:
            raise TruncatedFile(self._path, begin + nbytes, begin + count)  # somebody has cut the arena short
        self._count(count)
        return count

    def _check(self, end: int) -> None:
        if end > self._nbytes:
            raise TruncatedFile(self._path, end, self._nbytes)

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self.read_bytes += nbytes
