"""What makes the columns of an index usable: the rules, without any file. Knows numpy, not the file's format.

Each rule is one line about whole columns; nothing is looked at item by item, so a million items take well
under a second.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ckptd.checkpoint.indexing.columns import Index
from ckptd.staging.dtypes import DTYPES, OBJECT

# torch's own limit (at::kDimVectorStaticSize is 5, but TensorIterator and numpy stop at 64).
MAX_DIMENSIONS: Final = 64
# No offset, length or number of elements may reach this, so that sums and products of two stay within int64.
_LIMIT: Final = 1 << 61
_ITEMSIZE_BYTES: Final = np.array([dtype.itemsize_bytes for dtype in DTYPES], np.int64)


def check_columns(index: Index) -> str | None:
    """Return the first thing that is wrong with an index, or None."""
    for rules in (_lengths, _names, _items, _places):
        # Later rules compute with what earlier ones have checked, so they run only after those hold.
        for good, reason in rules(index):
            if not good:
                return reason
    return None


def _lengths(index: Index) -> Iterator[tuple[bool, str]]:
    count, items = len(index.names), len(index.item_name)
    dimensions = index.shape.shape[1] if index.shape.ndim == 2 else MAX_DIMENSIONS + 1
    yield dimensions <= MAX_DIMENSIONS, "it has too many dimensions"
    yield len(index.paths) == count, "names and paths differ in number"
    yield index.shape.shape == (count, dimensions), "names and shapes differ in number"
    for column in (index.dtype, index.ndim, index.requires_grad):
        yield column.shape == (count,), "names and their columns differ in number"
    for box in (index.item_offsets, index.item_sizes):
        yield box.shape == (items, dimensions), "items and their boxes differ in number"
    one_per_item = (
        index.item_file,
        index.record_offset,
        index.record_bytes,
        index.data_offset,
        index.data_bytes,
    )
    for one in one_per_item:
        yield one.shape == (items,), "items and their columns differ in number"
    yield index.item_hash.shape in {(items,), (0,)}, "items and hashes differ in number"


def _names(index: Index) -> Iterator[tuple[bool, str]]:
    yield len(set(index.names)) == len(index.names), "a name occurs twice"
    yield all(index.paths), "a path is empty"
    yield len(set(index.files)) == len(index.files), "a file occurs twice"
    for file in index.files:
        yield _is_plain(file), f"{file[:80]!r} is not the name of a file in the checkpoint's directory"
    is_object = index.dtype == OBJECT
    yield _all(is_object | (index.dtype < len(DTYPES))), "a dtype is unknown; a newer ckptd wrote it"
    yield _all(index.ndim <= index.shape.shape[1]), "a tensor has more dimensions than its shape"
    yield _all(~is_object | (index.ndim == 0)), "an object has dimensions"
    yield _all(index.requires_grad <= 1), "requires_grad is neither 0 nor 1"
    yield _in_range(index.shape, _LIMIT), "a shape is negative or too large"
    yield _zero_behind(index.shape, index.ndim), "a shape goes on behind its last dimension"


def _items(index: Index) -> Iterator[tuple[bool, str]]:
    yield _in_range(index.item_name, len(index.names)), "an item belongs to no name"
    yield _in_range(index.item_file, len(index.files)), "an item lies in no file"
    yield _in_range(index.item_offsets, _LIMIT), "an item begins before its tensor"
    yield _in_range(index.item_sizes, _LIMIT), "an item has a negative or too large size"
    ndim, shape = index.ndim[index.item_name], index.shape[index.item_name]
    yield _zero_behind(index.item_offsets, ndim), "an item's offsets go on behind the last dimension"
    yield _zero_behind(index.item_sizes, ndim), "an item's sizes go on behind the last dimension"
    yield _all(index.item_offsets + index.item_sizes <= shape), "an item reaches beyond its tensor"


def _places(index: Index) -> Iterator[tuple[bool, str]]:
    begin, length = index.record_offset, index.record_bytes
    yield _in_range(begin, _LIMIT) and _in_range(length, _LIMIT), "a record has a negative or too large place"
    known = index.data_bytes >= 0
    yield _all(known | (index.data_bytes == -1)), "a payload has a negative length"
    yield bool(known.all()) or len(index.item_hash) == 0, "a payload has a hash but no length"
    data_end = index.data_offset + np.maximum(index.data_bytes, 0)
    yield _in_range(index.data_offset, _LIMIT) and _in_range(data_end, _LIMIT), "a payload lies nowhere"
    yield (
        _all((begin <= index.data_offset) & (data_end <= begin + length)),
        "a payload lies outside of its record",
    )
    is_object = index.dtype[index.item_name] == OBJECT
    whole = (index.data_offset == begin) & (index.data_bytes == length)
    yield _all(~is_object | whole), "an object is not the whole of its record"
    rows = np.flatnonzero(known & ~is_object)
    wanted = _payload_bytes(index, rows)
    yield _all(wanted == index.data_bytes[rows]), "a payload's length is not that of its sizes and dtype"


def _payload_bytes(index: Index, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the bytes that tensor items need by their sizes; -1 where that is beyond the limit."""
    names = index.item_name[rows]
    exact = _ITEMSIZE_BYTES[index.dtype[names]]
    # The product of floats is inexact but does not wrap around, so it tells where the exact one would.
    inexact = exact.astype(np.float64)
    ndim = index.ndim[names]
    for axis in range(index.item_sizes.shape[1]):
        size = index.item_sizes[rows, axis]
        if ndim.min(initial=axis + 1) <= axis:
            size = np.where(ndim > axis, size, 1)
        exact *= size
        inexact *= size
    return np.where(inexact < _LIMIT, exact, -1)


def _all(flags: NDArray[np.bool_]) -> bool:
    return bool(flags.all())


def _in_range(column: NDArray[Any], end: int) -> bool:
    return column.size == 0 or bool(column.min() >= 0 and column.max() < end)


def _zero_behind(boxes: NDArray[np.int64], ndim: NDArray[np.uint8]) -> bool:
    fewest = int(ndim.min(initial=MAX_DIMENSIONS))
    return not any(boxes[ndim <= axis, axis].any() for axis in range(fewest, boxes.shape[1]))


def _is_plain(file: str) -> bool:
    return file not in {"", ".", ".."} and "/" not in file and "\0" not in file
