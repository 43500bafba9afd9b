"""Which requests bring the ranges that are wanted: neighbours together, large ranges in chunks. Arithmetic, no I/O.

Invariant: every wanted byte is in one request, and what requests bring besides is at most :data:`GAP_SHARE` of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from ckptd.checkpoint.indexing.columns import Int64
from ckptd.checkpoint.reading.blocks import brings_every_block, whole_blocks

# One request: with twelve readers it keeps an NVMe queue full while others copy. 8 MiB gained nothing, 2 MiB lost 5 %.
CHUNK_BYTES: Final = 4 << 20
# Reading a gap of 64 KiB costs less than a second request of its own.
MERGE_GAP_BYTES: Final = 64 * 1024
# All gaps that are read together, of what is wanted. With the rounding to blocks a load stays below 1.05.
GAP_SHARE: Final = 1 / 32
# Rows read by one request: they are cut into system calls anyway.
_ROWS_PER_REQUEST: Final = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Equally long parts of a range that are wanted, far enough apart to be read one by one.

    Attributes:
        starts: int64[R], where each begins, in bytes from the range's offset, ascending.
        row_bytes: Length of each.
    """

    starts: Int64
    row_bytes: int

    @property
    def span_bytes(self) -> int:
        """From the first byte of the range to the last wanted one."""
        return int(self.starts[-1]) + self.row_bytes


@dataclass(slots=True, eq=False)
class Read:
    """One range of a file that is wanted.

    Attributes:
        file: Path of the file.
        offset: First byte.
        nbytes: Wanted bytes; the range is longer where ``rows`` are given.
        address: Where the bytes go, a writable buffer of ``nbytes`` that the caller keeps; 0 if ``make`` is given.
        item: Name of the item, for errors.
        expected_hash: xxh3-64 of the range; None if it cannot be verified.
        then: Called in a reader's thread when all bytes are there and verified.
        make: Makes the buffer when its first bytes are about to be read, and returns its address: what is only passed
            on need not be held for all of a load.
        rows: The parts that are wanted; they go into the buffer one behind the other. None: the whole range.
    """

    file: str
    offset: int
    nbytes: int
    address: int
    item: str
    expected_hash: int | None = None
    then: Callable[[], None] | None = None
    make: Callable[[], int] | None = None
    rows: Rows | None = None

    @property
    def end(self) -> int:
        """One behind the last wanted byte in the file."""
        return self.offset + (self.nbytes if self.rows is None else self.rows.span_bytes)


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of one read that a request brings."""

    number: int  # position of the read in the list that was asked for
    begin: int  # offset in the file
    end: int


@dataclass(frozen=True, slots=True)
class Request:
    """A range of one file.

    Attributes:
        file: Path.
        begin: First byte.
        end: One behind the last.
        reads: Positions of the reads that may lie in it, by offset.
        rows: First and one behind the last row, if it brings rows of one read; else None.
        blocks: Begin and end, in bytes, of the large blocks that may come whole for the rows; alike if none may.
    """

    file: str
    begin: int
    end: int
    reads: Sequence[int]
    rows: tuple[int, int] | None = None
    blocks: tuple[int, int] = (0, 0)

    def pieces(self, wanted: Sequence[Read]) -> list[Piece]:
        """Return what it brings of each read, by offset."""
        begin, end = self.begin, self.end
        found = []
        for number in self.reads:
            read = wanted[number]
            first, last = read.offset, read.offset + read.nbytes
            if first < end and last > begin:
                found.append(Piece(number, max(first, begin), min(last, end)))
        return found


def requests_of(wanted: Sequence[Read]) -> list[Request]:
    """Return the requests for reads, file by file in ascending order. Empty reads need none."""
    by_file: dict[str, list[int]] = {}
    sparse: list[int] = []
    for number, read in enumerate(wanted):
        if read.rows is not None:
            sparse.append(number)
        elif read.nbytes:
            by_file.setdefault(read.file, []).append(number)
    dense = [_Sorted.of(file, numbers, wanted) for file, numbers in by_file.items()]
    largest = _largest_gap([each.gaps for each in dense], GAP_SHARE * sum(read.nbytes for read in wanted))
    requests = [request for each in dense for request in each.requests(largest)]
    return requests + _requests_of_rows(sparse, wanted)


@dataclass(frozen=True, eq=False)
class _Sorted:
    """The dense reads of one file by offset; ``reach`` is how far any of them so far reaches."""

    file: str
    numbers: list[int]
    begin: Int64
    reach: Int64

    @classmethod
    def of(cls, file: str, numbers: list[int], wanted: Sequence[Read]) -> _Sorted:
        """Sort reads, which mostly come in order."""
        begin = np.array([wanted[number].offset for number in numbers], np.int64)
        end = begin + np.array([wanted[number].nbytes for number in numbers], np.int64)
        if (np.diff(begin) < 0).any():
            order = np.argsort(begin, kind="stable")
            begin, end, numbers = begin[order], end[order], [numbers[at] for at in order.tolist()]
        return cls(file, numbers, begin, np.maximum.accumulate(end))

    @property
    def gaps(self) -> Int64:
        """Bytes between each read and those before it; negative where they overlap."""
        return self.begin[1:] - self.reach[:-1]

    def requests(self, largest_gap: int) -> Iterator[Request]:
        """Yield the requests, gaps up to ``largest_gap`` bytes closed."""
        apart = np.flatnonzero(self.gaps > largest_gap) + 1
        firsts = [0, *apart.tolist()]
        lasts = [*apart.tolist(), len(self.begin)]
        begins: list[int] = []
        ends: list[int] = []
        for first, end in zip(self.begin[firsts].tolist(), self.reach[[at - 1 for at in lasts]].tolist(), strict=True):
            # Requests end on multiples of the chunk, so that all but the first begin on a block.
            cuts = range((first // CHUNK_BYTES + 1) * CHUNK_BYTES, end, CHUNK_BYTES)
            begins += [first, *cuts]
            ends += [*cuts, end]
        lower = np.searchsorted(self.reach, begins, side="right").tolist()
        upper = np.searchsorted(self.begin, ends, side="left").tolist()
        for begin, end, low, high in zip(begins, ends, lower, upper, strict=True):
            if low < high:
                yield Request(self.file, begin, end, self.numbers[low:high])


def _largest_gap(gaps: Sequence[Int64], budget_bytes: float) -> int:
    """Return up to which size gaps can be read along, so that all of them together stay within a budget."""
    every = np.concatenate(gaps) if gaps else np.empty(0, np.int64)
    every = np.sort(every[(every > 0) & (every <= MERGE_GAP_BYTES)])
    affordable = int(np.searchsorted(np.cumsum(every), budget_bytes, side="right"))
    if affordable == len(every):
        return MERGE_GAP_BYTES
    # Gaps that are as large as the first which does not fit stay open, all of them: the answer is a size, not a list.
    return int(every[affordable]) - 1


def _of_rows(number: int, read: Read) -> Iterator[Request]:
    rows = read.rows
    assert rows is not None
    count = min(_ROWS_PER_REQUEST, max(1, CHUNK_BYTES // rows.row_bytes))
    for first in range(0, len(rows.starts), count):
        last = min(first + count, len(rows.starts))
        begin, end = read.offset + int(rows.starts[first]), read.offset + int(rows.starts[last - 1]) + rows.row_bytes
        yield Request(read.file, begin, end, (number,), (first, last))


def _requests_of_rows(numbers: Sequence[int], wanted: Sequence[Read]) -> list[Request]:
    """Return the requests for reads of rows, with the large blocks that each may bring whole."""
    requests: list[Request] = []
    close: dict[str, list[int]] = {}
    for number in numbers:
        read, before = wanted[number], len(requests)
        requests += _of_rows(number, read)
        if read.rows is not None and brings_every_block(read.rows.starts + read.offset, read.rows.row_bytes):
            close.setdefault(read.file, []).extend(range(before, len(requests)))
    for places in close.values():
        begins = np.array([requests[at].begin for at in places], np.int64)
        ends = np.array([requests[at].end for at in places], np.int64)
        first, last = whole_blocks(begins, ends)
        for at, *blocks in zip(places, first.tolist(), last.tolist(), strict=True):
            requests[at] = replace(requests[at], blocks=(blocks[0], blocks[1]))
    return requests


def pieces_in_steps(pieces: Sequence[Piece], step_bytes: int) -> Iterator[list[Piece]]:
    """Cut a request's pieces into groups that reach over a step at most, or are one piece alone.

    Args:
        pieces: In the order of their first bytes.
        step_bytes: Length of a step.
    """
    group: list[Piece] = []
    for piece in pieces:
        if group and piece.end - group[0].begin > step_bytes:
            yield group
            group = []
        group.append(piece)
    if group:
        yield group
