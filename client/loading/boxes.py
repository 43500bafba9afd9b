"""Boxes of row-major tensors: what two of them share, and which bytes of a file that is. Pure arithmetic."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from ckptd.checkpoint.planning.chunks import Extent
from ckptd.checkpoint.reading.requests import GAP_SHARE, Rows

# The smallest block of any disk: what lies between two wanted bytes of one comes with them.
_SECTOR_BYTES: Final = 512


@dataclass(frozen=True, slots=True)
class Overlap:
    """A box that two chunks share: its corner in each of them, and its extent, in elements."""

    in_stored: Extent
    in_wanted: Extent
    sizes: Extent


@dataclass(frozen=True, slots=True)
class Part:
    """The bytes of a stored chunk that are read for a box of it.

    Attributes:
        begin: First byte, from the chunk's own.
        nbytes: How many are read.
        rows: Where they lie, if not all behind one another.
        sizes: Extent of what is read, in elements: the box, or more where gaps are not worth leaving out.
        corner: Where the box begins in that.
    """

    begin: int
    nbytes: int
    rows: Rows | None
    sizes: Extent
    corner: Extent


def overlap_of(stored: tuple[Extent, Extent], wanted: tuple[Extent, Extent]) -> Overlap | None:
    """Return the box that two chunks, each given by offsets and sizes, share; None if they share nothing."""
    in_stored, in_wanted, sizes = [], [], []
    for at, extent, want, length in zip(*stored, *wanted, strict=True):
        begin, end = max(at, want), min(at + extent, want + length)
        if begin >= end:
            return None
        in_stored.append(begin - at)
        in_wanted.append(begin - want)
        sizes.append(end - begin)
    return Overlap(tuple(in_stored), tuple(in_wanted), tuple(sizes))


# Tensors of one shape, cut alike, have the same part, and its rows take most of the time of a plan. Few, as each holds
# 8 bytes for every row.
@functools.lru_cache(maxsize=32)
def part_of(stored: Extent, begins: Extent, sizes: Extent, *, itemsize: int) -> Part:
    """Return what to read for a box of a chunk.

    Args:
        stored: Extent of the chunk in elements, row-major in the file.
        begins: Corner of the box in it.
        sizes: Extent of the box, nowhere 0.
        itemsize: Bytes of an element.
    """
    first, extent = list(begins), list(sizes)
    strides = row_major(stored)
    run = itemsize  # bytes that lie behind one another, up to this dimension
    rows_from = 0  # dimensions before this one are walked row by row
    for dimension in reversed(range(len(stored))):
        run *= extent[dimension]
        gap = (stored[dimension] - extent[dimension]) * strides[dimension] * itemsize
        if gap and math.prod(extent[:dimension]) > 1:
            useful = math.prod(sizes[dimension:]) * itemsize
            if gap >= _SECTOR_BYTES and run + gap > (1 + GAP_SHARE) * useful:
                rows_from = dimension
                break
            first[dimension], extent[dimension] = 0, stored[dimension]
            run += gap
    begin = sum(at * stride for at, stride in zip(first, strides, strict=True)) * itemsize
    corner = tuple(at - base for at, base in zip(begins, first, strict=True))
    rows = _rows(extent[:rows_from], strides, itemsize=itemsize, row_bytes=run) if rows_from else None
    return Part(begin, math.prod(extent) * itemsize, rows, tuple(extent), corner)


def _rows(extent: list[int], strides: Extent, *, itemsize: int, row_bytes: int) -> Rows:
    starts = np.zeros((), np.int64)
    for size, stride in zip(extent, strides, strict=False):
        starts = starts[..., None] + np.arange(size, dtype=np.int64) * (stride * itemsize)
    return Rows(starts.reshape(-1), row_bytes)


def row_major(sizes: Extent) -> Extent:
    """Return the strides of a contiguous tensor, in elements."""
    strides: list[int] = []
    stride = 1
    for size in reversed(sizes):
        strides.append(stride)
        stride *= size
    return tuple(reversed(strides))
