"""Reads byte ranges of a checkpoint's files into memory: merged, in parallel, past the page cache where that is faster.

A range that is in the page cache is copied from there; the others are read with O_DIRECT. Ranges of whole items are
verified against their hash as soon as their last byte has landed. Knows no torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

from xxhash import xxh3_64_intdigest

from ckptd.checkpoint.pagecache import PageCacheProbe
from ckptd.protocol.errors import MissingFile, SystemCallFailed, TruncatedFile, WrongBits

# One read call: large enough for an NVMe queue, small enough that four threads keep a node's memory.
_CHUNK_BYTES: Final = 8 << 20
_BLOCK_BYTES: Final = 4096
_HUGE_PAGE_BYTES: Final = 2 << 20
# Reading a gap of 64 KiB costs less than a second request of its own.
_MERGE_GAP_BYTES: Final = 64 * 1024


@dataclass(eq=False)
class Read:
    """One range of a file that is wanted.

    Attributes:
        file: Path of the file.
        offset: First byte.
        nbytes: Length in bytes.
        address: Where the bytes go, a writable buffer of ``nbytes`` that the caller keeps; 0 if ``make`` is given.
        item: Name of the item, for errors.
        expected_hash: xxh3-64 of the range; None if it cannot be verified.
        then: Called in a reader's thread when all bytes are there and verified.
        make: Makes the buffer when its first bytes are about to be read, and returns its address: what is only passed
            on need not be held for all of a load.
        missing_bytes: How many have not landed yet.
    """

    file: str
    offset: int
    nbytes: int
    address: int
    item: str
    expected_hash: int | None = None
    then: Callable[[], None] | None = None
    make: Callable[[], int] | None = None
    missing_bytes: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        """Nothing has landed yet."""
        self.missing_bytes = self.nbytes


@dataclass(frozen=True)
class _Piece:
    """A part of a read that one request brings."""

    read: Read
    begin: int  # offset in the file
    nbytes: int

    @property
    def address(self) -> int:
        return self.read.address + (self.begin - self.read.offset)


@dataclass(frozen=True)
class _Request:
    """One range of one file, and the pieces in it, by offset."""

    file: str
    begin: int
    end: int
    pieces: list[_Piece]


def read_all(reads: Iterable[Read], *, threads: int = 4) -> int:
    """Perform all reads.

    Args:
        reads: The wanted ranges, in any order.
        threads: Number of readers.

    Returns:
        Bytes that were read from files, gaps between merged ranges included.

    Raises:
        MissingFile: A file is not there.
        TruncatedFile: A file is too short.
        WrongBits: A range does not match its hash; it was not handed on.
        SystemCallFailed: A read failed.
    """
    wanted = list(reads)
    for read in wanted:
        if read.nbytes == 0:
            _finish(read)
    requests = _merge([read for read in wanted if read.nbytes])
    with _Files(requests) as files:
        reading = _Reading(files, requests)
        with ThreadPoolExecutor(max(1, min(threads, len(requests))), thread_name_prefix="ckptd-read") as pool:
            for done in [pool.submit(reading.run) for _ in range(threads)]:
                done.result()
    return sum(request.end - request.begin for request in requests)


def _merge(reads: list[Read]) -> list[_Request]:
    """Cut reads into pieces of at most a chunk, and put near neighbours into one request."""
    requests: list[_Request] = []
    begin = end = 0
    pieces: list[_Piece] = []
    file = ""

    def flush() -> None:
        if pieces:
            requests.append(_Request(file, begin, end, list(pieces)))
            pieces.clear()

    for read in sorted(reads, key=lambda read: (read.file, read.offset)):
        at, last = read.offset, read.offset + read.nbytes
        while at < last:
            # A read may begin before the request that the end of the one before it came into.
            near = begin <= at <= end + _MERGE_GAP_BYTES and at - begin < _CHUNK_BYTES
            joins = pieces and read.file == file and near
            if not joins:
                flush()
                file, begin, end = read.file, at, at
            # Requests end on multiples of the chunk, so that all but the first begin on a block.
            limit = (begin // _CHUNK_BYTES + 1) * _CHUNK_BYTES
            if at >= limit:
                flush()
                begin = end = at
                continue
            stop = min(last, limit)
            pieces.append(_Piece(read, at, stop - at))
            end = max(end, stop)
            at = stop
    flush()
    return requests


@dataclass(frozen=True)
class _File:
    """One open file: through the page cache, and past it where that is possible."""

    buffered: int
    direct: int | None
    probe: PageCacheProbe


class _Files:
    """The files of a load."""

    def __init__(self, requests: list[_Request]) -> None:
        self._files: dict[str, _File] = {}
        needed: dict[str, int] = {}
        for request in requests:
            needed[request.file] = max(needed.get(request.file, 0), request.end)
        try:
            for path, nbytes in needed.items():
                self._files[path] = self._open(path, nbytes)
        except BaseException:
            self.close()
            raise

    def _open(self, path: str, needed_bytes: int) -> _File:
        try:
            buffered = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise MissingFile(path) from None
        except OSError as error:
            raise SystemCallFailed("open", path, error.errno or errno.EIO) from None
        size = os.fstat(buffered).st_size
        if size < needed_bytes:
            os.close(buffered)
            raise TruncatedFile(path, needed_bytes, size)
        probe = PageCacheProbe(buffered, size)
        try:
            return _File(buffered, os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT), probe)
        except OSError:
            return _File(buffered, None, probe)  # tmpfs, some overlays and network file systems have no O_DIRECT

    def __getitem__(self, path: str) -> _File:
        return self._files[path]

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all descriptors."""
        for file in self._files.values():
            file.probe.close()
            os.close(file.buffered)
            if file.direct is not None:
                os.close(file.direct)
        self._files.clear()


class _Reading:
    """One load on its way, shared by its threads."""

    def __init__(self, files: _Files, requests: list[_Request]) -> None:
        self._files = files
        self._requests = iter(requests)
        self._lock = threading.Lock()
        self._failed = False

    def run(self) -> None:
        """Perform requests until there are no more, or another thread has failed."""
        bounce = _huge_buffer(_CHUNK_BYTES + 2 * _BLOCK_BYTES)
        while True:
            with self._lock:
                request = None if self._failed else next(self._requests, None)
            if request is None:
                return
            try:
                self._perform(request, bounce)
            except BaseException:
                self._failed = True
                raise

    def _perform(self, request: _Request, bounce: memoryview) -> None:
        file = self._files[request.file]
        self._make_buffers(request)
        cached = file.direct is None or file.probe.is_cached(request.begin, request.end - request.begin)
        if not _straight(request, file, cached=cached):
            skip = _into(bounce, request, file, cached=cached)
            source = ctypes.addressof(ctypes.c_char.from_buffer(bounce)) + skip
            for piece in request.pieces:
                ctypes.memmove(piece.address, source + piece.begin - request.begin, piece.nbytes)
        for piece in request.pieces:
            with self._lock:
                piece.read.missing_bytes -= piece.nbytes
                complete = piece.read.missing_bytes == 0
            if complete:
                _finish(piece.read)

    def _make_buffers(self, request: _Request) -> None:
        for piece in request.pieces:
            read = piece.read
            if read.make is not None and not read.address:
                with self._lock:
                    read.address = read.address or read.make()


def _huge_buffer(nbytes: int) -> memoryview:
    """Return a page-aligned buffer in huge pages, where the kernel gives them.

    A request to a disk takes so many pieces of memory at most (max_segments; 254 for virtio), and a huge page is one
    piece. Measured: one disk read 3.3 GB/s into huge pages and 1.0 to 1.4 into pages of 4 KiB, as targets mostly are;
    the copy behind it runs at 20.
    """
    memory = mmap.mmap(-1, nbytes + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    begin = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % _HUGE_PAGE_BYTES
    return memoryview(memory)[begin : begin + nbytes]


def _straight(request: _Request, file: _File, *, cached: bool) -> bool:
    """Copy from the page cache into the one target of a request; return whether that was done."""
    if len(request.pieces) != 1:
        return False
    address, nbytes = request.pieces[0].address, request.pieces[0].nbytes
    if cached:
        _read_buffered(file.buffered, _memory(address, nbytes), request)
    return cached


def _into(bounce: memoryview, request: _Request, file: _File, *, cached: bool) -> int:
    """Read a request into the bounce buffer; return where in it the request begins."""
    if file.direct is not None and not cached:
        begin = request.begin // _BLOCK_BYTES * _BLOCK_BYTES
        end = -(-request.end // _BLOCK_BYTES) * _BLOCK_BYTES
        if _read_direct(file.direct, bounce[: end - begin], begin, request.end - begin):
            return request.begin - begin
    _read_buffered(file.buffered, bounce[: request.end - request.begin], request)
    return 0


def _read_direct(descriptor: int, target: memoryview, offset: int, needed_bytes: int | None = None) -> bool:
    """Read past the page cache; return False if the file system will not, or stops short."""
    try:
        return os.preadv(descriptor, [target], offset) >= (target.nbytes if needed_bytes is None else needed_bytes)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise SystemCallFailed("pread", _path(descriptor), error.errno or errno.EIO) from None


def _read_buffered(descriptor: int, target: memoryview, request: _Request) -> None:
    done = 0
    while done < target.nbytes:
        try:
            count = os.preadv(descriptor, [target[done:]], request.begin + done)
        except OSError as error:
            raise SystemCallFailed("pread", request.file, error.errno or errno.EIO) from None
        if count == 0:
            raise TruncatedFile(request.file, request.end, request.begin + done)
        done += count


def _path(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


def _memory(address: int, nbytes: int) -> memoryview:
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")


def _finish(read: Read) -> None:
    if read.expected_hash is not None:
        found = xxh3_64_intdigest(_memory(read.address, read.nbytes) if read.nbytes else b"")
        if found != read.expected_hash:
            raise WrongBits(read.file, read.item, read.offset)
    if read.then is not None:
        read.then()
