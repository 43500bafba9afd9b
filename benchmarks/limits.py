"""The machine's own limits: a memcpy into shared memory, raw O_DIRECT writes and reads, a matmul loop beside them.

They drift by the minute, and memory is as fast as the kernel's choice of its pages: so besides a turn of their own,
:class:`PairedLimits` takes them in the process, and in the moment, of the figure that is held against them.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks.matmul import slowdown_beside, thread_counts
from benchmarks.measure import delete_and_settle
from benchmarks.samples import LimitsResult, SlowdownSample

if TYPE_CHECKING:
    import torch

# Four threads with 8 MiB each fill the queue of an NVMe disk; fewer or smaller writes were slower on every disk tried,
# more or larger ones no faster.
_THREADS: Final = 4
_CHUNK_BYTES: Final = 8 << 20
_HUGE_PAGE_BYTES: Final = 2 << 20
_BLOCK_BYTES: Final = 4096  # O_DIRECT wants offset, length and address in multiples of it: open(2)

_libc = ctypes.CDLL(None, use_errno=True)


def measure_limits(nbytes: int, directory: Path, *, repeats: int, tell: Callable[[str], None]) -> LimitsResult:
    """Measure each limit several times.

    Args:
        nbytes: Bytes to copy, write and read; rounded up to whole blocks.
        directory: Where the file lies: on the disk that is to be measured.
        repeats: How often.
        tell: Called with what comes next.
    """
    nbytes = -(-nbytes // _BLOCK_BYTES) * _BLOCK_BYTES
    result = LimitsResult(
        nbytes=nbytes, memcpy_s=[], memcpy_cpu_s=[], write_s=[], write_cpu_s=[], read_s=[], slowdowns=[]
    )
    tell("touching memory")
    private = _private_memory(nbytes)
    _fill(private)
    # Behind the private pages, as in a trainer: the first ones come from the kernel's scattered leftovers, and the disk
    # writes scattered pages at half the rate.
    shared = _shared_memory(nbytes)
    _copy(private, shared)
    path = directory / "limit"
    for number in range(repeats):
        tell(f"repetition {number + 1} of {repeats}")
        cpu_begun_s = time.process_time()
        result.memcpy_s.append(_timed(lambda: _copy(private, shared)))
        result.memcpy_cpu_s.append(time.process_time() - cpu_begun_s)
        cpu_begun_s = time.process_time()
        result.write_s.append(_write(path, shared))
        result.write_cpu_s.append(time.process_time() - cpu_begun_s)
        result.read_s.append(_read(path))
        delete_and_settle(path)
    tell("matmul beside the raw write")
    result.slowdowns.extend(_slowdown(path, shared, threads) for threads in thread_counts())
    return result


class PairedLimits:
    """Limits taken between a system's own saves and loads, on the same bytes.

    Args:
        tensors: The tensors that are saved: contiguous, in host memory.
        directory: Where raw files go.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], directory: Path) -> None:
        nbytes = sum(tensor.nbytes for tensor in tensors)
        self._target = _shared_memory(-(-nbytes // _BLOCK_BYTES) * _BLOCK_BYTES)
        self._tensors, self._directory = tensors, directory
        self.memcpy_s()  # touches the target

    def memcpy_s(self) -> float:
        """Return the seconds of one memmove for each tensor, into touched shared memory, by all cores."""
        at, blocks = _address(self._target), []
        for tensor in self._tensors:
            blocks.append((at, tensor.data_ptr(), tensor.nbytes))
            at += tensor.nbytes

        left = iter(blocks)
        return _timed(lambda: _in_threads(lambda _thread: _copy_blocks(left)))

    def write_s(self) -> float:
        """Return the seconds of a raw write of as many bytes."""
        path = self._directory / "paired"
        try:
            return _write(path, self._target)
        finally:
            delete_and_settle(path)

    def read_s(self, path: Path) -> float:
        """Return the seconds of a raw read of a checkpoint's files, one after the other."""
        return sum(_read(file) for file in sorted(path.iterdir()))


def _slowdown(path: Path, shared: mmap.mmap, threads: int) -> SlowdownSample:
    with ThreadPoolExecutor(1) as writer:
        return slowdown_beside(
            lambda: writer.submit(_write, path, shared), threads=threads, settle=lambda: delete_and_settle(path)
        )


def _private_memory(nbytes: int) -> mmap.mmap:
    """Return memory as malloc gives it to large tensors; Python's own default for a mapping is a shared one."""
    return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _shared_memory(nbytes: int) -> mmap.mmap:
    """Return a mapping of a nameless file on the same tmpfs that the arenas lie on."""
    descriptor = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
        return mmap.mmap(descriptor, nbytes)
    finally:
        os.close(descriptor)


def _fill(memory: mmap.mmap) -> None:
    """Touch every page, with bytes that no disk can compress."""
    block = random.Random(0).randbytes(_CHUNK_BYTES)
    for begin in range(0, len(memory), len(block)):
        part = block[: len(memory) - begin]
        memory[begin : begin + len(part)] = part


def _copy(source: mmap.mmap, target: mmap.mmap) -> None:
    """Copy by all cores: on few of them one alone does not reach what the memory gives."""

    def copy(_thread: int, begin: int, end: int) -> None:
        ctypes.memmove(_address(target) + begin, _address(source) + begin, end - begin)

    _in_chunks(len(source), copy, threads=_copiers())


def _copy_blocks(blocks: Iterator[tuple[int, int, int]]) -> None:
    for block in blocks:
        ctypes.memmove(*block)


def _copiers() -> int:
    return min(_THREADS, len(os.sched_getaffinity(0)))


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _timed(function: Callable[[], object]) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def _write(path: Path, memory: mmap.mmap) -> float:
    """Write a new file with preallocated blocks and return the seconds of the writes and the fsync."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT | os.O_CLOEXEC, 0o600)
    try:
        if _libc.fallocate(descriptor, 0, ctypes.c_long(0), ctypes.c_long(len(memory))) != 0:
            raise OSError(ctypes.get_errno(), "fallocate", str(path))
        view = memoryview(memory)

        def write(_thread: int, begin: int, end: int) -> None:
            while begin < end:
                begin += os.pwrite(descriptor, view[begin:end], begin)

        def write_and_sync() -> None:
            _in_chunks(len(memory), write)
            os.fsync(descriptor)

        return _timed(write_and_sync)
    finally:
        os.close(descriptor)


def _read(path: Path) -> float:
    """Read a file past the page cache and return the seconds.

    The buffers lie in huge pages. A request to a disk takes so many pieces of memory at most (max_segments; 254 for
    virtio), and a huge page is one piece: one disk read 3.3 GB/s into these, 1.4 into pages of 4 KiB touched in order,
    1.0 into such touched at random.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    buffers = [_huge_pages() for _ in range(_THREADS)]
    try:

        def read(thread: int, begin: int, end: int) -> None:
            buffer = buffers[thread]
            while begin < end:
                wanted = -(-(end - begin) // _BLOCK_BYTES) * _BLOCK_BYTES  # a file's end is in no multiple of blocks
                count = os.preadv(descriptor, [buffer[:wanted]], begin)
                if count == 0:
                    raise OSError(f"{path} ends at {begin} bytes")
                begin += count

        return _timed(lambda: _in_chunks(path.stat().st_size, read))
    finally:
        os.close(descriptor)


def _huge_pages() -> memoryview:
    """Return a touched buffer of one chunk, in huge pages where the kernel has them to give."""
    memory = _private_memory(_CHUNK_BYTES + _HUGE_PAGE_BYTES)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    _fill(memory)
    begin = -_address(memory) % _HUGE_PAGE_BYTES
    return memoryview(memory)[begin : begin + _CHUNK_BYTES]


def _in_chunks(nbytes: int, perform: Callable[[int, int, int], None], *, threads: int = _THREADS) -> None:
    """Call ``perform(thread, begin, end)`` for each chunk, from several threads."""
    begins = iter(range(0, nbytes, _CHUNK_BYTES))
    lock = threading.Lock()

    def run(thread: int) -> None:
        while True:
            with lock:
                begin = next(begins, None)
            if begin is None:
                return
            perform(thread, begin, min(begin + _CHUNK_BYTES, nbytes))

    _in_threads(run, threads=threads)


def _in_threads(run: Callable[[int], None], *, threads: int | None = None) -> None:
    """Call ``run(thread)`` in several threads at once; as many as copy if not said."""
    with ThreadPoolExecutor(threads or _copiers()) as pool:
        for done in [pool.submit(run, thread) for thread in range(threads or _copiers())]:
            done.result()
