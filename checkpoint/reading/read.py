"""Reads byte ranges of a checkpoint's files into memory: merged, in parallel, each byte verified before it counts.

Items that one request brings whole are verified before they are copied to where they belong; longer ones are hashed
behind the pieces as they land, while these are still in the processor's caches. What lies in memory already is copied
and hashed in steps that fit into the caches of one core. Knows no torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Final

import numpy as np
from xxhash import xxh3_64_intdigest

from ckptd.checkpoint.collector import collector_paused
from ckptd.checkpoint.reading import requests as read_requests
from ckptd.checkpoint.reading.blocks import BLOCK_BYTES
from ckptd.checkpoint.reading.files import Disk, Source, SourceFile, memory_at
from ckptd.checkpoint.reading.following import FollowingHash
from ckptd.checkpoint.reading.requests import Piece, Read, Request, Rows, pieces_in_steps, requests_of
from ckptd.protocol.errors import WrongBits

__all__ = ["READERS", "Read", "ReadCount", "Rows", "read_all"]

# A reader that copies and hashes has nothing in the disk's queue, so there are more of them than the disk needs.
# Measured beside the raw read with 4 in flight: 4 readers 0.86, 8 0.90, 12 0.98 of its rate.
READERS: Final = 12
# From memory the cores are all there is to wait for. Each takes so many requests at a time, 32 MiB, that tensors mostly
# stay with one core, which hashes what it has just copied. Measured, 2 GB on two cores with 2 MiB of cache each, with
# hashes: 12 readers 336 ms; 2 readers 311 ms, in steps of 512 KiB 288 ms; without hashes 227 ms.
_FROM_MEMORY_AT_ONCE: Final = 8
_STEP_BYTES: Final = 512 << 10
_HUGE_PAGE_BYTES: Final = 2 << 20


@dataclass(frozen=True)
class ReadCount:
    """What a load asked for and what was brought for it, in bytes.

    Attributes:
        wanted_bytes: Sum of all reads.
        read_bytes: What came from files: gaps between merged ranges and rounding to blocks included.
    """

    wanted_bytes: int
    read_bytes: int


def read_all(
    reads: Iterable[Read], *, threads: int = READERS, source: Source | None = None, in_memory: bool = False
) -> ReadCount:
    """Perform all reads.

    Args:
        reads: The wanted ranges, in any order.
        threads: Number of readers; each holds a buffer of one chunk.
        source: Where the bytes come from; the files themselves if left out.
        in_memory: The source has its bytes in memory: its files fill any target, and more readers than cores are of no
            use.

    Returns:
        How many bytes were wanted and read.

    Raises:
        MissingFile: A file is not there.
        TruncatedFile: A file is too short.
        WrongBits: A range does not match its hash; it was not handed on.
        SystemCallFailed: A read failed.
    """
    wanted = list(reads)
    with collector_paused():
        requests = requests_of(wanted)
    with _Files(source or Disk(), requests) as files:
        readers = min(threads, len(os.sched_getaffinity(0))) if in_memory else threads
        readers = max(1, min(readers, len(requests)))
        reading = _Reading(files, requests, wanted, in_memory=in_memory, readers=readers)
        for number, read in enumerate(wanted):
            if read.nbytes == 0:
                reading.finish(number, xxh3_64_intdigest(b""))
        if requests:
            with ThreadPoolExecutor(readers, thread_name_prefix="ckptd-read") as pool:
                for done in [pool.submit(reading.run) for _ in range(readers)]:
                    done.result()
        return ReadCount(sum(read.nbytes for read in wanted), files.read_bytes())


class _Files:
    """The open files of a load."""

    def __init__(self, source: Source, requests: Sequence[Request]) -> None:
        self._files: dict[str, SourceFile] = {}
        ranges: dict[str, list[tuple[int, int]]] = {}
        for request in requests:
            ranges.setdefault(request.file, []).append((request.begin, request.end))
        try:
            for path, needed in ranges.items():
                self._files[path] = source.open(path, needed)
        except BaseException:
            self.close()
            raise

    def __getitem__(self, path: str) -> SourceFile:
        return self._files[path]

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read_bytes(self) -> int:
        """Return what all files have brought."""
        return sum(file.read_bytes for file in self._files.values())

    def close(self) -> None:
        """Close all files."""
        while self._files:
            self._files.popitem()[1].close()


class _Reading:
    """One load on its way, shared by its readers."""

    def __init__(
        self, files: _Files, requests: Sequence[Request], wanted: Sequence[Read], *, in_memory: bool, readers: int
    ) -> None:
        self._files, self._wanted = files, wanted
        self._step_bytes = _STEP_BYTES if in_memory else 0
        fair = len(requests) // (4 * readers)  # at the end no reader shall have much more left than another
        self._at_once = max(1, min(_FROM_MEMORY_AT_ONCE, fair)) if in_memory else 1
        self._requests = iter(requests)
        self._missing_bytes = [read.nbytes for read in wanted]
        self._hashes: dict[int, FollowingHash] = {}
        self._lock = threading.Lock()
        self._failed = False

    def run(self) -> None:
        """Perform requests until there are no more, or another reader has failed."""
        bounce = huge_buffer(read_requests.CHUNK_BYTES + 2 * BLOCK_BYTES)
        while True:
            with self._lock:
                requests = () if self._failed else tuple(islice(self._requests, self._at_once))
            if not requests:
                return
            try:
                for request in requests:
                    self._perform(request, bounce)
            except BaseException:
                self._failed = True
                raise

    def _perform(self, request: Request, bounce: memoryview) -> None:
        if request.rows is not None:
            self._perform_rows(request, *request.rows)
            return
        pieces = request.pieces(self._wanted)
        if not pieces:
            return
        for piece in pieces:
            self._make_buffer(self._wanted[piece.number])
        file = self._files[request.file]
        for some in pieces_in_steps(pieces, self._step_bytes) if self._step_bytes else [pieces]:
            self._bring(file, some, bounce)

    def _bring(self, file: SourceFile, pieces: Sequence[Piece], bounce: memoryview) -> None:
        begin, end = pieces[0].begin, max(piece.end for piece in pieces)
        if len(pieces) == 1 and 0 < self._step_bytes < end - begin:
            self._bring_in_steps(file, pieces[0])
            return
        targets = self._targets(pieces, bounce)
        if targets is not None and file.fill(begin, targets):
            for piece in pieces:
                self._landed(piece, verified=False)
            return
        self._scatter(pieces, begin, file.view(begin, end, bounce))

    def _bring_in_steps(self, file: SourceFile, piece: Piece) -> None:
        """Copy a long piece part by part; each is hashed right behind its copy, if it is this piece's turn."""
        read = self._wanted[piece.number]
        target = memory_at(read.address + piece.begin - read.offset, piece.end - piece.begin)
        following = None if read.expected_hash is None else self._hash_of(piece.number)
        claimed = following is not None and following.claim(piece)
        for at in range(0, len(target), self._step_bytes):
            part = target[at : at + self._step_bytes]
            filled = file.fill(piece.begin + at, [part])
            assert filled, "a source whose bytes are in memory fills any target"
            if claimed and following is not None:
                following.update(part)
        if following is None:
            self._landed(piece, verified=False)
            return
        found = following.end(piece) if claimed else following.follow(piece)
        if found is not None:
            self.finish(piece.number, found)

    def _scatter(self, pieces: Sequence[Piece], begin: int, data: memoryview) -> None:
        """Verify what came whole, then copy everything to where it belongs."""
        address = address_of(data)
        for piece in pieces:
            read = self._wanted[piece.number]
            nbytes = piece.end - piece.begin
            whole = nbytes == read.nbytes and read.expected_hash is not None
            if whole:
                self._check(read, xxh3_64_intdigest(data[piece.begin - begin : piece.end - begin]))
            ctypes.memmove(read.address + piece.begin - read.offset, address + piece.begin - begin, nbytes)
            self._landed(piece, verified=whole)

    def _perform_rows(self, request: Request, first: int, last: int) -> None:
        [number] = request.reads
        read = self._wanted[number]
        rows = read.rows
        assert rows is not None
        self._make_buffer(read)
        nbytes = (last - first) * rows.row_bytes
        target = memory_at(read.address + first * rows.row_bytes, nbytes)
        begins = rows.starts[first:last] + read.offset
        self._files[request.file].fill_rows(begins, rows.row_bytes, target, blocks=request.blocks)
        if self._is_complete(number, nbytes):
            self.finish(number, None)

    def _targets(self, pieces: Sequence[Piece], bounce: memoryview) -> list[memoryview] | None:
        """Return where the bytes of a request go, gaps included; None if two reads want the same bytes."""
        targets = []
        at = pieces[0].begin
        for piece in pieces:
            if piece.begin < at:
                return None
            if piece.begin > at:
                targets.append(bounce[: piece.begin - at])
            read = self._wanted[piece.number]
            targets.append(memory_at(read.address + piece.begin - read.offset, piece.end - piece.begin))
            at = piece.end
        return targets

    def _make_buffer(self, read: Read) -> None:
        if read.make is not None and not read.address:
            with self._lock:
                read.address = read.address or read.make()

    def _landed(self, piece: Piece, *, verified: bool) -> None:
        read = self._wanted[piece.number]
        nbytes = piece.end - piece.begin
        if read.expected_hash is None or verified:
            if self._is_complete(piece.number, nbytes):
                self.finish(piece.number, None)
        elif nbytes == read.nbytes:
            self.finish(piece.number, xxh3_64_intdigest(memory_at(read.address, nbytes)))
        else:
            found = self._hash_of(piece.number).follow(piece)
            if found is not None:
                self.finish(piece.number, found)

    def _hash_of(self, number: int) -> FollowingHash:
        with self._lock:
            return self._hashes.setdefault(number, FollowingHash(self._wanted[number]))

    def _is_complete(self, number: int, nbytes: int) -> bool:
        with self._lock:
            self._missing_bytes[number] -= nbytes
            return self._missing_bytes[number] == 0

    def finish(self, number: int, found_hash: int | None) -> None:
        """Hand a read on whose bytes are all there.

        Args:
            number: Its position.
            found_hash: Of its bytes; None if that has been looked at, or need not be.
        """
        read = self._wanted[number]
        if found_hash is not None:
            self._check(read, found_hash)
        if read.then is not None:
            read.then()

    def _check(self, read: Read, found_hash: int) -> None:
        if read.expected_hash is not None and found_hash != read.expected_hash:
            raise WrongBits(read.file, read.item, read.offset)


def address_of(view: memoryview) -> int:
    """Return where the bytes of a view lie."""
    # numpy takes the address of a read-only buffer, which ctypes refuses to.
    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0])


def huge_buffer(nbytes: int) -> memoryview:
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
