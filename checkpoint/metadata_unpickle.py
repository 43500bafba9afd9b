"""Stock's ``.metadata`` read without torch, and without trusting it.

Two guards stand before the unpickler. A scan over the opcodes allows only those that a checkpoint's metadata
is made of, and no position of the memo that the file cannot fill: one flipped bit can turn REDUCE into
LONG_BINPUT, and CPython then allocates, and touches, up to 64 GiB. ``find_class`` knows a closed set of names
and gives stand-ins of our own, made anew for each file, so that a pickle which changes one changes no other.
What is left: a file made for the purpose can nest tuples until CPython's hash of them overflows the C stack.
Sources: torch/distributed/checkpoint/metadata.py of torch 2.3 to 2.13; Modules/_pickle.c, _Unpickler_MemoPut.
"""

from __future__ import annotations

import gc
import io
import pickle
import posixpath
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, Final

import numpy as np

from ckptd.checkpoint.columns import Index, Int64, KeyPath
from ckptd.checkpoint.index_check import MAX_DIMENSIONS, check_columns
from ckptd.protocol.errors import BadIndex, Unsupported
from ckptd.staging.dtypes import OBJECT, by_name

_DCP: Final = "torch.distributed.checkpoint.metadata"
# torch before 2.3 had the properties of a tensor there; later ones still read them from old files.
_SHARDED: Final = "torch.distributed._shard.sharded_tensor.metadata"
_FILESYSTEM: Final = "torch.distributed.checkpoint.filesystem"

# Opcodes without an argument, then those with one of fixed length: all that pickle.dump of protocol 2 to 5
# writes for classes, tuples, lists, dicts, numbers and None. Strings, GLOBAL and LONG_BINPUT are looked at
# singly. The scan takes 7 % of the time of stock's unpickling.
_RUN: Final = re.compile(
    rb"(?:[()\]}.0NRabestu\x81\x85-\x89\x93\x94]++|[Khq].|M..|[Jj].{4}|G.{8}|\x80[\x02-\x05]|\x95.{8}"
    rb"|\x8a(?:\0|\x01.|\x02..|\x03.{3}|\x04.{4}|\x05.{5}|\x06.{6}|\x07.{7}|\x08.{8}))*+",
    re.DOTALL,
)
_GLOBAL: Final = re.compile(rb"c[\w.]{1,200}\n[\w.]{1,200}\n")
# A path of the file system is at most 4096 bytes (PATH_MAX); the rest is for a URL's sake.
_MAX_PATH_CHARACTERS: Final = 1 << 16
# What the unpickler, and the reading of what it made, raise at malformed input.
_MALFORMED: Final = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


def decode_metadata(data: bytes, path: str) -> Index:
    """Return the index that a stock ``.metadata`` (torch 2.3 or later) amounts to.

    What such a file does not say: there are no hashes (``item_hash`` is empty); of tensors only the records
    are known (``data_offset`` is the record's offset, ``data_bytes`` is -1); names without planner data have
    themselves as path.

    Args:
        data: The whole file.
        path: Named in errors.

    Raises:
        BadIndex: Damaged, contradictory, or with classes that no checkpoint needs; load another checkpoint.
        Unsupported: Its files were transformed (compressed, say) by an extension of DCP; load it with torch.
    """
    _scan(data, path)
    classes = _StandIns()
    try:
        with collector_paused():
            metadata = _Unpickler(data, classes, path).load()
            index = _index(metadata, classes)
    except _MALFORMED as error:
        raise BadIndex(path, f"not the metadata of a checkpoint ({type(error).__name__}: {error})"[:200]) from None
    reason = check_columns(index)
    if reason is not None:
        raise BadIndex(path, reason)
    return index


@contextmanager
def collector_paused() -> Iterator[None]:
    """Keep the cyclic garbage collector from walking over millions of new objects: half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _scan(data: bytes, path: str) -> None:
    """Refuse opcodes that a checkpoint's metadata does not have; see the module's head."""
    at, size = 0, len(data)
    while True:
        match = _RUN.match(data, at)
        at = match.end() if match else at
        opcode, argument = data[at : at + 1], int.from_bytes(data[at + 1 : at + 5], "little")
        if opcode == b"\x8c":
            at += 2 + (argument & 0xFF)
        elif opcode == b"X":
            at += 5 + argument
        elif opcode == b"r" and argument < size:
            at += 5
        elif opcode == b"c" and (found := _GLOBAL.match(data, at)):
            at = found.end()
        elif opcode:
            raise BadIndex(path, f"not the metadata of a checkpoint: opcode {opcode!r} at offset {at}")
        else:
            break
    if at != size or data[-1:] != b".":
        raise BadIndex(path, "not the metadata of a checkpoint: it is cut short")


class _StandIns:
    """Stands in for torch's classes, for one file."""

    def __init__(self) -> None:
        self.metadata, self.tensor, self.object = _class("Metadata"), _class("Tensor"), _class("Object")
        self.chunk, self.place = _class("Chunk"), _class("Place", transform_descriptors=None)
        self.key, self.storage_meta = _class("Key", offset=None), _class("StorageMeta")
        self.properties = _class("Properties", __setstate__=lambda self, state: setattr(self, "state", state))

    def find(self) -> dict[tuple[str, str], object]:
        """Return everything that a stock ``.metadata`` may name, except dtypes."""

        # No builtins here: tuple(...) of a list, again and again, would let a small file fill the memory.
        def size(sizes: object) -> object:
            return _of_type(sizes, tuple)

        def join(*parts: str) -> str:
            if sum(map(len, parts)) > _MAX_PATH_CHARACTERS:
                raise ValueError("a path is too long")
            return posixpath.join(*parts)

        paths = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
        return {
            (_DCP, "Metadata"): self.metadata,
            (_DCP, "TensorStorageMetadata"): self.tensor,
            (_DCP, "BytesStorageMetadata"): self.object,
            (_DCP, "ChunkStorageMetadata"): self.chunk,
            (_DCP, "MetadataIndex"): self.key,
            (_DCP, "StorageMeta"): self.storage_meta,
            (_DCP, "TensorProperties"): self.properties,
            (_SHARDED, "TensorProperties"): self.properties,
            (_DCP, "_MEM_FORMAT_ENCODING"): lambda encoding: None,
            (_SHARDED, "MEM_FORMAT_ENCODING"): lambda encoding: None,
            (_FILESYSTEM, "_StorageInfo"): self.place,
            ("torch", "Size"): size,
            ("torch.serialization", "_get_layout"): lambda name: None,
            ("collections", "OrderedDict"): lambda: {},
            **{("pathlib", name): join for name in paths},
            **{("pathlib._local", name): join for name in paths},  # Python 3.13
        }


def _class(name: str, **attributes: object) -> Any:
    return type(name, (), attributes)


class _Unpickler(pickle.Unpickler):
    """CPython's unpickler, confined to the stand-ins."""

    def __init__(self, data: bytes, classes: _StandIns, path: str) -> None:
        super().__init__(io.BytesIO(data))
        self._known = classes.find()
        self._path = path

    def find_class(self, module: str, name: str) -> object:
        """Return a stand-in, or a dtype's code; called by the unpickler."""
        found = self._known.get((module, name))
        if found is not None:
            return found
        if module == "torch":
            try:
                return by_name(name).code
            except Unsupported:
                pass
        raise BadIndex(self._path, f"it wants the forbidden class {module}.{name}"[:200])


def _index(metadata: Any, classes: _StandIns) -> Index:
    """Return the index that the stand-ins amount to, unchecked; raises one of ``_MALFORMED`` if to none."""
    entries = _of_type(metadata.state_dict_metadata, dict)
    names = _all_of_type(entries, {str})
    dtypes, grads, shapes = [], [], []
    for entry in entries.values():
        is_object = type(entry) is classes.object
        state = (OBJECT, None, False) if is_object else _of_type(entry, classes.tensor).properties.state
        dtypes.append(state[0])
        grads.append(state[2])
        shapes.append(() if is_object else entry.size)
    items = _items(metadata, classes)
    ndim = _lengths(shapes)
    item_name = _column([item[0] for item in items])
    item_ndim, dimensions = ndim[item_name], int(ndim.max(initial=0))
    files = {file: row for row, file in enumerate(dict.fromkeys(item[3].relative_path for item in items))}
    records = _column([item[3].offset for item in items])
    return Index(
        header=_header(metadata),
        names=names,
        paths=_paths(names, metadata.planner_data),
        dtype=_column(dtypes, limit=256).astype(np.uint8),
        ndim=ndim.astype(np.uint8),
        shape=_boxes(shapes, ndim, dimensions),
        requires_grad=np.array(_all_of_type(grads, {bool}), np.uint8),
        item_name=item_name,
        item_offsets=_boxes([item[1] for item in items], item_ndim, dimensions),
        item_sizes=_boxes([item[2] for item in items], item_ndim, dimensions),
        files=_all_of_type(files, {str}),
        item_file=np.array([files[item[3].relative_path] for item in items], np.int32),
        record_offset=records,
        record_bytes=(lengths := _column([item[3].length for item in items])),
        data_offset=records,
        data_bytes=np.where(np.array(dtypes, np.int64)[item_name] == OBJECT, lengths, -1),
        item_hash=np.zeros(0, np.uint64),
    )


def _items(metadata: Any, classes: _StandIns) -> list[tuple[int, Any, Any, Any]]:
    """Return name row, offsets, sizes and place of each item."""
    storage = _of_type(metadata.storage_data, dict)
    places = {(key.fqn, key.offset): _of_type(place, classes.place) for key, place in storage.items()}
    for place in places.values():
        if place.transform_descriptors:
            remedy = "load it with torch.distributed.checkpoint and the extensions that wrote it"
            raise Unsupported("a checkpoint with transformed files", remedy)
    items: list[tuple[int, Any, Any, Any]] = []
    try:
        for row, (name, entry) in enumerate(metadata.state_dict_metadata.items()):
            if type(entry) is classes.object:
                items.append((row, (), (), places[name, None]))
                continue
            for chunk in _of_type(entry.chunks, list):
                items.append((row, chunk.offsets, chunk.sizes, places[name, chunk.offsets]))
    except KeyError as error:
        raise LookupError(f"{error.args[0]} lies in no file") from None
    return items


def _header(metadata: Any) -> dict[str, str]:
    header = {"origin": "torch.distributed.checkpoint"}
    fields = getattr(metadata, "storage_meta", None)
    for name in ("checkpoint_id", "save_id"):
        value = getattr(fields, name, None)
        if isinstance(value, str):
            header[name] = value
    return header


def _paths(names: list[str], planner_data: object) -> list[KeyPath]:
    if not isinstance(planner_data, dict):  # stock's planner without flatten_state_dict, or a user's own
        return [(name,) for name in names]
    paths = [planner_data.get(name, (name,)) for name in names]
    _all_of_type(chain.from_iterable(_all_of_type(paths, {tuple})), {str, int})
    return paths


def _boxes(boxes: list[Any], ndim: Int64, dimensions: int) -> Int64:
    """Return tuples of ``ndim`` integers as a matrix, zero padded."""
    if (_lengths(boxes) != ndim).any():
        raise ValueError("a chunk has other dimensions than its tensor")
    matrix = np.zeros((len(boxes), dimensions), np.int64)
    matrix[np.arange(dimensions) < ndim[:, None]] = _column(list(chain.from_iterable(boxes)))
    return matrix


def _lengths(boxes: list[Any]) -> Int64:
    lengths = np.fromiter(map(len, _all_of_type(boxes, {tuple})), np.int64, len(boxes))
    if lengths.max(initial=0) > MAX_DIMENSIONS:
        raise ValueError(f"a tensor of more than {MAX_DIMENSIONS} dimensions")
    return lengths


def _column(values: Collection[Any], limit: int = 1 << 62) -> Int64:
    column = np.array(_all_of_type(values, {int}), np.int64)
    if (column >= limit).any() or (column < 0).any():
        raise ValueError("a number that is negative or too large")
    return column


def _all_of_type(values: Iterable[Any], kinds: set[type]) -> list[Any]:
    values = list(values)
    wrong = set(map(type, values)) - kinds
    if wrong:
        raise TypeError(f"a {wrong.pop().__name__} where a {min(kind.__name__ for kind in kinds)} belongs")
    return values


def _of_type(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"a {type(value).__name__} where a {kind.__name__} belongs")
    return value
