"""Writes one rank's staged image to its file: O_DIRECT from several threads, hashing items while they are warm.

Nothing is parsed or copied on the way: the image is the file. Invariant: the call returns only when the bytes are
durable.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from ckptd.checkpoint.image.frame import frame_hash, frame_ranges
from ckptd.checkpoint.planning.items import Int64
from ckptd.checkpoint.system import closed_at_end, named, preallocate
from ckptd.protocol.crash_points import CrashPoint, reach
from ckptd.protocol.errors import DiskFull, SystemCallFailed


@dataclass(frozen=True)
class Written:
    """What became of an image.

    Attributes:
        bytes_written: Size of the file in bytes.
        hashes: ``[K]`` xxh3-64 of each item's bytes, in image order.
        frame_hash: xxh3-64 of all other bytes; see :mod:`ckptd.checkpoint.image.frame`.
        write_s: Seconds spent writing and hashing.
        fsync_s: Seconds spent in fsync.
        direct: Whether the page cache was passed by.
    """

    bytes_written: int
    hashes: NDArray[np.uint64]
    frame_hash: int
    write_s: float
    fsync_s: float
    direct: bool


@dataclass(frozen=True)
class Payloads:
    """The items' bytes in an image, by offset. ``indexed``: which of them the index will name."""

    offsets: Int64
    lengths: Int64
    indexed: NDArray[np.bool_]


@dataclass(frozen=True)
class Pace:
    """How an image is written: number of threads, and bytes per write (a multiple of 4096)."""

    threads: int
    chunk_bytes: int


def write_image(
    path: str,
    image: memoryview,
    items: Payloads,
    *,
    pace: Pace,
    on_progress: Callable[[int], None],
) -> Written:
    """Write ``image`` to a new file at ``path`` and make it durable.

    Args:
        path: File to write; an old one of a try that died is overwritten.
        image: The bytes; length and address are multiples of 4096.
        items: Where the items' bytes lie in the image.
        pace: Threads and chunk size.
        on_progress: Called with the number of bytes written so far, from any thread.

    Raises:
        DiskFull: The volume has too little room; nothing was written.
        SystemCallFailed: A call failed; the file is incomplete.
    """
    check_room(os.path.dirname(path), image.nbytes)
    descriptor, direct = open_image(path)
    reach(CrashPoint.WORKER_FILE_OPENED)
    with closed_at_end(descriptor, path):
        preallocate(descriptor, image.nbytes, path)
        begun = time.perf_counter()
        writing = Writing(path, descriptor, image, items, pace.chunk_bytes, on_progress)
        writing.direct = direct
        writing.run_all(pace.threads)
        ranges = frame_ranges(items.offsets[items.indexed], items.lengths[items.indexed], image.nbytes)
        frame = frame_hash(ranges, lambda begin, end: image[begin:end])
        written = time.perf_counter()
        reach(CrashPoint.WORKER_WRITTEN)
        named("fsync", path, lambda: os.fsync(descriptor))
        synced = time.perf_counter()
    reach(CrashPoint.WORKER_FSYNCED)
    return Written(image.nbytes, writing.hashes, frame, written - begun, synced - written, writing.direct)


def check_room(directory: str, wanted_bytes: int) -> None:
    """Raise DiskFull if a directory's volume has fewer bytes free."""
    volume = named("statvfs", directory, lambda: os.statvfs(directory))
    free = volume.f_bavail * volume.f_frsize
    # A volume of no blocks at all does not tell: ramfs, and some that lie behind FUSE.
    if volume.f_blocks and free < wanted_bytes:
        raise DiskFull(directory, wanted_bytes, free)


def open_image(path: str, *, new: bool = True) -> tuple[int, bool]:
    """Return the descriptor of an image's file, made or emptied if it is to be ``new``, and whether it is direct."""
    flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_CREAT | os.O_TRUNC if new else 0)
    try:
        return os.open(path, flags | os.O_DIRECT, 0o666), True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise SystemCallFailed("open", path, error.errno or errno.EIO) from None
    return named("open", path, lambda: os.open(path, flags, 0o666)), False


class Writing:
    """One image, or a part of one, on its way: shared by the threads.

    Attributes:
        hashes: xxh3-64 of each item.
        direct: Whether the page cache is passed by.
        file_offset: Where the first byte goes.
    """

    def __init__(
        self,
        path: str,
        descriptor: int,
        image: memoryview,
        items: Payloads,
        chunk_bytes: int,
        on_progress: Callable[[int], None],
    ) -> None:
        self.path, self.descriptor, self.image = path, descriptor, image
        self.hashes = np.zeros(len(items.offsets), np.uint64)
        self.direct = True
        self.file_offset = 0
        self._offsets, self._lengths = items.offsets.tolist(), items.lengths.tolist()
        self._chunks = self._plan_chunks(items.offsets, chunk_bytes)
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._done_bytes = 0
        self._failed = False

    def _plan_chunks(self, offsets: Int64, chunk_bytes: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield begin and end of each write, and the range of items that begin in it."""
        for begin in range(0, self.image.nbytes, chunk_bytes):
            end = min(begin + chunk_bytes, self.image.nbytes)
            first, last = np.searchsorted(offsets, [begin, end])
            yield begin, end, int(first), int(last)

    def run_all(self, threads: int) -> None:
        """Write everything from several threads. Raises SystemCallFailed."""
        with ThreadPoolExecutor(threads, thread_name_prefix="ckptd-write") as pool:
            for done in [pool.submit(self.run) for _ in range(threads)]:
                done.result()  # the first failure is raised; the others stop at their next chunk

    def run(self) -> None:
        """Write chunks until there are no more, or another thread has failed."""
        while True:
            with self._lock:
                chunk = None if self._failed else next(self._chunks, None)
            if chunk is None:
                return
            try:
                self._write(*chunk)
            except BaseException:
                self._failed = True
                raise

    def _write(self, begin: int, end: int, first: int, last: int) -> None:
        for item in range(first, last):
            offset = self._offsets[item]
            self.hashes[item] = xxh3_64_intdigest(self.image[offset : offset + self._lengths[item]])
        at = begin
        while at < end:
            at += self._pwrite(at, end)
        with self._lock:
            self._done_bytes += end - begin
            done = self._done_bytes
        reach(CrashPoint.WORKER_CHUNK_WRITTEN)
        self._on_progress(done)

    def _pwrite(self, begin: int, end: int) -> int:
        direct = self.direct  # as it was before the call: another thread may go buffered meanwhile
        try:
            return os.pwrite(self.descriptor, self.image[begin:end], self.file_offset + begin)
        except OSError as error:
            if error.errno == errno.EINVAL and direct:
                # The file system took O_DIRECT at open but refuses it at the write, or a short write left us
                # unaligned: go through the page cache from here on.
                self._go_buffered()
                return 0
            raise SystemCallFailed("pwrite", self.path, error.errno or errno.EIO) from None

    def _go_buffered(self) -> None:
        with self._lock:
            if self.direct:
                flags = fcntl.fcntl(self.descriptor, fcntl.F_GETFL)
                fcntl.fcntl(self.descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
                self.direct = False
