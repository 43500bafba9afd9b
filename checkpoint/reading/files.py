"""Where a load's bytes come from: the seam, and the disk behind it.

What is in the page cache is copied from there; the rest is read past it with O_DIRECT, unless a request is so short
that rounding it to blocks would show.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import sys
import threading
from collections.abc import Iterable, Sequence
from typing import Final, Protocol

from ckptd.checkpoint.directory import Opener
from ckptd.checkpoint.indexing.columns import Int64
from ckptd.checkpoint.reading.blocks import BLOCK_BYTES, brings_every_block
from ckptd.checkpoint.reading.mapped import MappedFile
from ckptd.checkpoint.reading.pagecache import PageCacheProbe
from ckptd.protocol.errors import MissingFile, SystemCallFailed, TruncatedFile

# What rounding to blocks may add to a request before it is rather read through the page cache.
_ROUNDING_SHARE: Final = 1 / 64
# Shorter rows are copied out of a mapping: a call for each costs 10 us, as much as copying these.
SHORT_ROW_BYTES: Final = 64 * 1024
# The kernel cuts longer advice to what it reads ahead, 128 KiB unless told otherwise, or the disk's largest request;
# what is missing then would come with its large block. Source: force_page_cache_ra().
_ADVICE_BYTES: Final = 128 * 1024
# One preadv takes so many targets. Source: limits.h, IOV_MAX.
TARGETS_AT_MOST: Final = 1024

# All of memory as bytes: a slice is a view of what lies at an address, at a tenth of the cost of a ctypes array of its
# own. Nothing is read or written before somebody does so through a slice.
_MEMORY: Final = memoryview((ctypes.c_char * sys.maxsize).from_address(0)).cast("B")


def memory_at(address: int, nbytes: int) -> memoryview:
    """Return the memory at an address, which its owner keeps, as writable bytes."""
    return _MEMORY[address : address + nbytes]


class SourceFile(Protocol):
    """One open file of a source. Called from several threads at once."""

    @property
    def read_bytes(self) -> int:
        """What was brought from storage so far, in bytes, gaps and rounding included."""

    def fill(self, begin: int, targets: Sequence[memoryview]) -> bool:
        """Put a range into targets, one behind the other, if that needs no buffer between; else return False."""

    def view(self, begin: int, end: int, bounce: memoryview) -> memoryview:
        """Return the bytes of a range, in the buffer, which has room for it and two blocks more, or elsewhere."""

    def fill_rows(self, begins: Int64, row_bytes: int, target: memoryview, *, blocks: tuple[int, int]) -> None:
        """Put equally long ranges into a target, one behind the other.

        Args:
            begins: int64[R], where they begin in the file.
            row_bytes: Length of each.
            target: ``R * row_bytes`` bytes.
            blocks: Begin and end of what may come along, in whole large blocks; alike if nothing may.
        """

    def close(self) -> None:
        """Let the file go."""


class Source(Protocol):
    """Where files are opened.

    Attributes:
        name: Where the bytes come from, as a load reports it: ``"disk"``, ``"memory"`` or ``"node cache"``.
    """

    name: str

    def open(self, path: str, ranges: Sequence[tuple[int, int]]) -> SourceFile:
        """Open a file for some ranges.

        Args:
            path: The file.
            ranges: Begin and end of all that will be asked for, in bytes.

        Raises:
            MissingFile: It is not there.
            TruncatedFile: It ends before a range does.
            SystemCallFailed: It cannot be opened.
        """


class Disk:
    """Files as the kernel gives them.

    Args:
        opener: How they are opened; by path if left out.
    """

    name = "disk"

    def __init__(self, opener: Opener | None = None) -> None:
        self._opener = opener

    def open(self, path: str, ranges: Sequence[tuple[int, int]]) -> DiskFile:
        """Open a file."""
        begins, ends = zip(*ranges, strict=True) if ranges else ((0,), (0,))
        return DiskFile(path, min(begins), max(ends), opener=self._opener)


class DiskFile:
    """An open file: through the page cache, and past it where that is possible.

    Args:
        path: The file.
        begin: Where the first range begins.
        end: Where the last one ends.
        opener: How it is opened; by path if left out.

    Raises:
        MissingFile: It is not there.
        TruncatedFile: It is too short.
        SystemCallFailed: It cannot be opened.
    """

    def __init__(self, path: str, begin: int, end: int, *, opener: Opener | None = None) -> None:
        open_file = opener or os.open
        self.read_bytes = 0
        self._path, self._needed_bytes = path, end
        self._lock = threading.Lock()
        self._direct: int | None = None
        try:
            # To open a pipe that lies in a file's place would wait for its writer; files do not mind the flag.
            self._buffered = open_file(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise MissingFile(path) from None
        except OSError as error:
            raise SystemCallFailed("open", path, error.errno or errno.EIO) from None
        stat = os.fstat(self._buffered)
        # Names the bytes, whatever path leads to them: published files are never written into, only replaced.
        self.identity = f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}"
        size = stat.st_size
        if size < end:
            os.close(self._buffered)
            raise TruncatedFile(path, end, size)
        self._probe = PageCacheProbe(self._buffered, size)
        self._mapped = MappedFile(self._buffered, size)
        self._is_cached = self._probe.is_all_or_nothing(begin, end - begin)
        with contextlib.suppress(OSError):  # tmpfs, some overlays and network file systems have no O_DIRECT
            self._direct = open_file(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
            # Only short requests are left for the page cache: nothing behind them is wanted.
            os.posix_fadvise(self._buffered, 0, 0, os.POSIX_FADV_RANDOM)

    def fill(self, begin: int, targets: Sequence[memoryview]) -> bool:
        """Copy from the page cache, if it holds all of the range."""
        if len(targets) > TARGETS_AT_MOST:
            return False
        nbytes = sum(map(len, targets))
        if self._direct is not None and not self._cached(begin, nbytes):
            return False
        self._read(begin, targets, nbytes)
        return True

    def view(self, begin: int, end: int, bounce: memoryview) -> memoryview:
        """Read past the page cache, or through it where the file system or the request's size asks for that."""
        first, last = begin // BLOCK_BYTES * BLOCK_BYTES, -(-end // BLOCK_BYTES) * BLOCK_BYTES
        rounding = (last - first) - (end - begin)
        if self._direct is not None and rounding <= _ROUNDING_SHARE * (end - begin):
            done = self._read_direct(first, bounce[: last - first])
            if done >= end - first:
                return bounce[begin - first : end - first]
        self._read(begin, [bounce[: end - begin]], end - begin)
        return bounce[: end - begin]

    def fill_rows(self, begins: Int64, row_bytes: int, target: memoryview, *, blocks: tuple[int, int]) -> None:
        """Read rows through the page cache, all of them asked for ahead of the first wait."""
        first, end = int(begins[0]), int(begins[-1]) + row_bytes
        can_map = row_bytes < SHORT_ROW_BYTES
        if not self._cached(first, end - first):
            every_block = brings_every_block(begins, row_bytes)
            can_map = can_map and every_block
            comes, ends = blocks if can_map and self._mapped.brings_large_blocks() else (end, end)
            rows = ((begin, begin + row_bytes) for begin in begins.tolist())
            self._ask_for([(first, min(comes, end)), (max(ends, first), end)] if every_block else rows)
        if can_map and self._mapped.copy_rows(begins, row_bytes, target):
            self._count(len(target))
            return
        self._read_rows(begins, row_bytes, target)

    def _ask_for(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Have the disk begin with ranges."""
        with contextlib.suppress(OSError):  # advice that a file system may not know
            for begin, end in ranges:
                for at in range(begin, end, _ADVICE_BYTES):
                    os.posix_fadvise(self._buffered, at, min(end - at, _ADVICE_BYTES), os.POSIX_FADV_WILLNEED)

    def _read_rows(self, begins: Int64, row_bytes: int, target: memoryview) -> None:
        """Read rows by a call each; what is done besides for each of them shows."""
        descriptor, at, whole = self._buffered, 0, 0
        try:
            for offset in begins.tolist():
                row = target[at : at + row_bytes]
                if os.preadv(descriptor, (row,), offset) == row_bytes:
                    whole += 1
                else:
                    self._read(offset, [row], row_bytes)
                at += row_bytes
        except OSError as error:
            raise SystemCallFailed("pread", self._path, error.errno or errno.EIO) from None
        self._count(whole * row_bytes)

    def close(self) -> None:
        """Close the descriptors."""
        self._probe.close()
        self._mapped.close()
        os.close(self._buffered)
        if self._direct is not None:
            os.close(self._direct)

    def _cached(self, begin: int, nbytes: int) -> bool:
        return self._probe.is_cached(begin, nbytes) if self._is_cached is None else self._is_cached

    def _read_direct(self, begin: int, target: memoryview) -> int:
        """Read past the page cache; return how many bytes came, 0 if the file system will not."""
        assert self._direct is not None
        try:
            count = os.preadv(self._direct, [target], begin)
        except OSError as error:
            if error.errno == errno.EINVAL:
                return 0
            raise SystemCallFailed("pread", self._path, error.errno or errno.EIO) from None
        self._count(count)
        return count

    def _read(self, begin: int, targets: Sequence[memoryview], nbytes: int) -> None:
        """Read through the page cache until the targets are full."""
        rest = list(targets)
        done = 0
        while done < nbytes:
            count = self._preadv(self._buffered, rest, begin + done)
            if count == 0:
                raise TruncatedFile(self._path, self._needed_bytes, begin + done)
            done += count
            self._count(count)
            rest = _behind(rest, count)

    def _preadv(self, descriptor: int, targets: Sequence[memoryview], offset: int) -> int:
        try:
            return os.preadv(descriptor, targets, offset)
        except OSError as error:
            raise SystemCallFailed("pread", self._path, error.errno or errno.EIO) from None

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self.read_bytes += nbytes


def _behind(targets: list[memoryview], nbytes: int) -> list[memoryview]:
    """Return what is left of targets when their first bytes are full."""
    for number, target in enumerate(targets):
        if nbytes < len(target):
            return [target[nbytes:], *targets[number + 1 :]]
        nbytes -= len(target)
    return []
