"""Columns of a stock ``.metadata``, written down while it is unpickled, so that its objects need not be kept.

A stand-in for each of torch's classes notes the state that the unpickler gives it in columns, and keeps the number of
its row; so an object that occurs twice is noted once and found twice. What was noted is cleared: the unpickler's memo
would keep it to the end. Offsets, sizes and shapes are numbered: there are far fewer distinct ones than items.
Stand-ins are made anew for each file, so that a pickle which changes one changes no other.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable
from itertools import chain
from operator import attrgetter
from typing import Any, Final

import numpy as np

from ckptd.checkpoint.indexing.check import MAX_DIMENSIONS
from ckptd.checkpoint.indexing.columns import Index, Int64, KeyPath
from ckptd.protocol.errors import Unsupported
from ckptd.staging.dtypes import OBJECT

_NO_BOX: Final = -1  # an object's offset
_LIMIT: Final = 1 << 62


class Metadata:
    """Stands in for torch's Metadata, and StorageMeta."""

    state_dict_metadata: Any
    planner_data: Any = None
    storage_data: Any
    storage_meta: Any = None


class Columns:
    """What the stand-ins of one file have noted; ``array`` because a list of a million integers is five times as large.

    Attributes:
        boxes: All distinct offsets, sizes and shapes, numbered.
        names: All names that have a place, numbered.
        files: All files, numbered.
    """

    def __init__(self) -> None:
        self.boxes: dict[Any, int] = {(): 0}
        self.names: dict[Any, int] = {}
        self.files: dict[Any, int] = {}
        self.tensor_kind, self.tensor_shape, self.tensor_chunks, self.chunks = (array("q") for _ in range(4))
        self.chunk_offsets, self.chunk_sizes = array("q"), array("q")
        self.key_name, self.key_offsets = array("q"), array("q")
        self.place_file, self.place_offset, self.place_length = array("q"), array("q"), array("q")


class StandIns:
    """Stand-ins for torch's classes, for one file."""

    def __init__(self) -> None:
        self.columns = columns = Columns()
        self.metadata, self.storage_meta = type("Metadata", (Metadata,), {}), type("StorageMeta", (), {})
        self.object = type("Object", (), {})
        self.properties, self.tensor = _properties_class(), _tensor_class(columns)
        self.chunk, self.key, self.place = _chunk_class(columns), _key_class(columns), _place_class(columns)


def _properties_class() -> type:
    class Properties:
        __slots__ = ("kind",)

        def __setstate__(self, state: Any) -> None:
            dtype, requires_grad = state[0], state[2]
            if type(dtype) is not int or type(requires_grad) is not bool or not 0 <= dtype < OBJECT:
                raise TypeError("properties that no tensor has")
            self.kind = 2 * dtype + requires_grad

    return Properties


def _tensor_class(columns: Columns) -> type:
    boxes, kinds, shapes = columns.boxes, columns.tensor_kind, columns.tensor_shape
    lengths, chunks, row_of_chunk = columns.tensor_chunks, columns.chunks, attrgetter("chunk")

    class Tensor:
        __slots__ = ("tensor",)

        def __setstate__(self, state: Any) -> None:
            held = _of_type(state["chunks"], list)
            self.tensor = len(kinds)
            kinds.append(state["properties"].kind)
            shapes.append(boxes.setdefault(state["size"], len(boxes)))
            lengths.append(len(held))
            chunks.extend(map(row_of_chunk, held))
            state.clear()

    return Tensor


def _chunk_class(columns: Columns) -> type:
    boxes, offsets, sizes = columns.boxes, columns.chunk_offsets, columns.chunk_sizes

    class Chunk:
        __slots__ = ("chunk",)

        def __setstate__(self, state: Any) -> None:
            self.chunk = len(offsets)
            offsets.append(boxes.setdefault(state["offsets"], len(boxes)))
            sizes.append(boxes.setdefault(state["sizes"], len(boxes)))
            state.clear()

    return Chunk


def _key_class(columns: Columns) -> type:
    boxes, names, key_name, offsets = columns.boxes, columns.names, columns.key_name, columns.key_offsets

    class Key:
        __slots__ = ("key",)

        def __setstate__(self, state: Any) -> None:
            self.key = len(key_name)
            offset = state.get("offset")
            key_name.append(names.setdefault(state["fqn"], len(names)))
            offsets.append(_NO_BOX if offset is None else boxes.setdefault(offset, len(boxes)))
            state.clear()

    return Key


def _place_class(columns: Columns) -> type:
    files, file, offsets, lengths = columns.files, columns.place_file, columns.place_offset, columns.place_length

    class Place:
        __slots__ = ("place",)

        def __setstate__(self, state: Any) -> None:
            if state.get("transform_descriptors"):
                remedy = "load it with torch.distributed.checkpoint and the extensions that wrote it"
                raise Unsupported("a checkpoint with transformed files", remedy)
            offset, length = state["offset"], state["length"]
            if type(offset) is not int or type(length) is not int:
                raise TypeError("a place that is no number")
            self.place = len(offsets)
            file.append(files.setdefault(state["relative_path"], len(files)))
            offsets.append(offset)
            lengths.append(length)
            state.clear()

    return Place


def to_index(metadata: Any, classes: StandIns) -> Index:
    """Return the index that unpickled metadata amount to, unchecked.

    Raises:
        TypeError, ValueError, LookupError, AttributeError, ArithmeticError: They amount to none.
    """
    entries = _of_type(_of_type(metadata, classes.metadata).state_dict_metadata, dict)
    columns, boxes = classes.columns, _Boxes(classes.columns.boxes)
    names, tensor = all_of_type(entries, {str}), _tensor_rows(entries, classes)
    is_object = tensor < 0
    shape = _taken(columns.tensor_shape, tensor, 0)
    dtype = np.where(is_object, OBJECT, _taken(columns.tensor_kind, tensor, 0) >> 1)
    item_name, chunk = _items(columns, tensor)
    offsets, sizes = _taken(columns.chunk_offsets, chunk, 0), _taken(columns.chunk_sizes, chunk, 0)
    if (boxes.ndim[np.stack([offsets, sizes])] != boxes.ndim[shape[item_name]]).any():
        raise ValueError("a chunk has other dimensions than its tensor")
    keys = np.where(is_object[item_name], _NO_BOX, offsets)
    place = _places(metadata, columns, names, (item_name, keys))
    dimensions = int(boxes.ndim[shape].max(initial=0))
    records, lengths = (_taken(column, place, 0) for column in (columns.place_offset, columns.place_length))
    if (records | lengths).min(initial=0) < 0 or max(records.max(initial=0), lengths.max(initial=0)) >= _LIMIT:
        raise ValueError("a place that is negative or too large")
    files, item_file = np.unique(_taken(columns.place_file, place, 0), return_inverse=True)
    all_files = all_of_type(columns.files, {str})
    return Index(
        header=_header(metadata),
        names=names,
        paths=_paths(names, metadata.planner_data),
        dtype=dtype.astype(np.uint8),
        ndim=boxes.ndim[shape].astype(np.uint8),
        shape=boxes.matrix[shape, :dimensions],
        requires_grad=(_taken(columns.tensor_kind, tensor, 0) & 1).astype(np.uint8),
        item_name=item_name,
        item_offsets=boxes.matrix[offsets, :dimensions],
        item_sizes=boxes.matrix[sizes, :dimensions],
        files=[all_files[file] for file in files.tolist()],
        item_file=item_file.astype(np.int32),
        record_offset=records,
        record_bytes=lengths,
        data_offset=records,
        data_bytes=np.where(is_object[item_name], lengths, -1),
        item_hash=np.zeros(0, np.uint64),
    )


def _tensor_rows(entries: dict[str, Any], classes: StandIns) -> Int64:
    """Return the row of each name's tensor; -1 for objects."""
    kinds = set(map(type, entries.values()))
    if kinds == {classes.tensor}:
        return _rows(entries.values(), "tensor")
    if kinds - {classes.tensor, classes.object}:
        raise TypeError("an entry that is neither a tensor nor an object")
    rows = (-1 if type(entry) is classes.object else entry.tensor for entry in entries.values())
    return np.fromiter(rows, np.int64, len(entries))


def _items(columns: Columns, tensor: Int64) -> tuple[Int64, Int64]:
    """Return the name row and the chunk row of each item, in the order of names; -1 for an object's chunk."""
    lengths = _taken(columns.tensor_chunks, tensor, 1)
    ends = np.cumsum(np.frombuffer(columns.tensor_chunks, np.int64))
    begins = np.where(tensor < 0, 0, ends[tensor] - lengths) if len(ends) else np.zeros(len(tensor), np.int64)
    item_name = np.repeat(np.arange(len(tensor)), lengths)
    # Within its name, an item's number counts from 0.
    number = np.arange(len(item_name)) - (np.cumsum(lengths) - lengths)[item_name]
    at = np.where(tensor[item_name] < 0, -1, begins[item_name] + number)
    return item_name, _taken(columns.chunks, at, -1)


class _Boxes:
    """All distinct boxes as one matrix, and the number of dimensions of each."""

    def __init__(self, boxes: Iterable[Any]) -> None:
        found = all_of_type(boxes, {tuple})
        self.ndim = np.fromiter(map(len, found), np.int64, len(found))
        dimensions = int(self.ndim.max(initial=0))
        if dimensions > MAX_DIMENSIONS:
            raise ValueError(f"a tensor of more than {MAX_DIMENSIONS} dimensions")
        numbers = all_of_type(chain.from_iterable(found), {int})
        column = np.fromiter(numbers, np.int64, len(numbers))
        if column.min(initial=0) < 0 or column.max(initial=0) >= _LIMIT:
            raise ValueError("a size that is negative or too large")
        self.matrix = np.zeros((len(found), dimensions), np.int64)
        self.matrix[np.arange(dimensions) < self.ndim[:, None]] = column


def _places(metadata: Any, columns: Columns, names: list[str], items: tuple[Int64, Int64]) -> Int64:
    """Return the row of each item's place; ``items`` are their name rows, and the boxes of their offsets."""
    storage = _of_type(metadata.storage_data, dict)
    keys, places = _rows(storage, "key"), _rows(storage.values(), "place")
    number_of = np.fromiter((columns.names.get(name, -1) for name in names), np.int64, len(names))
    # Name and offset as one number.
    spread = len(columns.boxes) + 1
    stored = _taken(columns.key_name, keys, 0) * spread + _taken(columns.key_offsets, keys, 0)
    wanted = number_of[items[0]] * spread + items[1]
    order = np.argsort(stored, kind="stable")
    at = np.searchsorted(stored[order], wanted, side="right") - 1
    missing = (at < 0) | (stored[order][at] != wanted) if len(order) else np.ones(len(wanted), np.bool_)
    if missing.any():
        raise LookupError(f"a part of {names[int(items[0][np.argmax(missing)])]} lies in no file")
    return places[order][at]


def _rows(objects: Collection[Any], attribute: str) -> Int64:
    """Return the rows of objects of one kind; each kind calls it otherwise. Raises AttributeError at any other."""
    return np.fromiter(map(attrgetter(attribute), objects), np.int64, len(objects))


def _taken(column: array[int], rows: Int64, default: int) -> Int64:
    """Return a column's values at some rows; ``default`` where the row is -1."""
    values = np.append(np.frombuffer(column, np.int64), default)
    return values[rows]


def _header(metadata: Any) -> dict[str, str]:
    header = {"origin": "torch.distributed.checkpoint"}
    for name in ("checkpoint_id", "save_id"):
        value = getattr(metadata.storage_meta, name, None)
        if isinstance(value, str):
            header[name] = value
    return header


def _paths(names: list[str], planner_data: object) -> list[KeyPath]:
    if not isinstance(planner_data, dict):  # stock's planner without flatten_state_dict, or a user's own
        return [(name,) for name in names]
    paths = [planner_data.get(name, (name,)) for name in names]
    all_of_type(chain.from_iterable(all_of_type(paths, {tuple})), {str, int})
    return paths


def all_of_type(values: Iterable[Any], kinds: set[type]) -> list[Any]:
    """Return all values as a list. Raises TypeError if one is of another type; a subclass is one."""
    values = list(values)
    wrong = set(map(type, values)) - kinds
    if wrong:
        raise TypeError(f"a {wrong.pop().__name__} where a {min(kind.__name__ for kind in kinds)} belongs")
    return values


def _of_type(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"a {type(value).__name__} where a {kind.__name__} belongs")
    return value
