"""A whole tensor as one stream of bytes in C order, however many boxes hold it.

Boxes that lie one behind the other are passed on as they are read; others (columns of a matrix, say) are put together
in memory, so that at most one tensor is held.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptd.checkpoint.formats.source import PIECE_BYTES, Box, Entry, Source
from ckptd.checkpoint.planning.tiling import check_tiling

# Slices, with an ellipsis behind them.
Corner = tuple[Any, ...]


def whole(source: Source, entry: Entry) -> Iterator[memoryview]:
    """Yield the bytes of a tensor; each piece is gone when the next is asked for.

    Raises:
        BadPlan: Its boxes leave a gap or overlap.
        StorageError: Bytes are missing or wrong.
    """
    check_boxes(entry)
    boxes = sorted((box for box in entry.boxes if box.elements), key=lambda box: box.offsets)
    if all(is_run(box, entry.shape) for box in boxes):
        for box in boxes:
            yield from source.pieces(entry, box)
        return
    values = assemble(source, entry).reshape(-1).view(np.uint8).data
    for begin in range(0, len(values), PIECE_BYTES):
        yield values[begin : begin + PIECE_BYTES]


def check_boxes(entry: Entry) -> None:
    """Refuse boxes that do not tile their tensor. Raises BadPlan."""
    width = len(entry.shape)

    def matrix(rows: list[tuple[int, ...]]) -> NDArray[np.int64]:
        return np.array(rows, np.int64).reshape(len(rows), width)

    offsets, sizes = [box.offsets for box in entry.boxes], [box.sizes for box in entry.boxes]
    chunks = (np.zeros(len(entry.boxes), np.int64), matrix(offsets), matrix(sizes))
    check_tiling([entry.name], matrix([entry.shape]), np.array([width], np.uint8), chunks)


def is_run(box: Box, shape: tuple[int, ...]) -> bool:
    """Return whether a box is one stretch of its tensor's bytes."""
    partial = [size != length for size, length in zip(box.sizes, shape, strict=True)]
    if True not in partial:
        return True
    # Before the last dimension that is cut, every extent must be 1.
    last = len(partial) - 1 - partial[::-1].index(True)
    return all(size == 1 for size in box.sizes[:last])


def assemble(source: Source, entry: Entry) -> NDArray[Any]:
    """Return a tensor's values as an array of elements without a type (numpy lacks bfloat16 and its like).

    Raises:
        StorageError: Bytes are missing or wrong.
    """
    element = np.dtype((np.void, entry.itemsize_bytes))
    values = np.empty(entry.shape, element)
    for box in entry.boxes:
        # With an ellipsis, even an index of no dimensions makes a view.
        corner: Any = (*(slice(at, at + size) for at, size in zip(box.offsets, box.sizes, strict=True)), ...)
        place = values[corner]
        parts = list(_slabs(box.sizes, entry.itemsize_bytes)) if box.elements else []
        cuts = (nbytes for _, nbytes in parts)
        for (part, _), piece in zip(parts, source.pieces(entry, box, cuts), strict=True):
            target = place[part]
            target[...] = np.frombuffer(piece, element).reshape(target.shape)
    return values


def _slabs(sizes: tuple[int, ...], itemsize: int) -> Iterator[tuple[Corner, int]]:
    """Cut a box into parts of some MiB that are stretches of its payload, in order: slices and length in bytes."""
    inner = [math.prod(sizes[axis + 1 :]) * itemsize for axis in range(len(sizes))]
    axis = next((axis for axis, nbytes in enumerate(inner) if nbytes <= PIECE_BYTES), None)
    if axis is None:  # no dimensions
        yield (...,), itemsize
        return
    step = max(PIECE_BYTES // max(inner[axis], 1), 1)
    for outer in np.ndindex(*sizes[:axis]):
        for begin in range(0, sizes[axis], step):
            end = min(begin + step, sizes[axis])
            yield (*(slice(at, at + 1) for at in outer), slice(begin, end), ...), (end - begin) * inner[axis]
