"""Where the values lie in the records of stock checkpoints, whose metadata tells only where records begin.

A record is a zip archive that `torch.save` made of one tensor: its directory tells where the storage lies, its pickle
how the tensor lies in that. Invariant: a place is told only for a contiguous tensor, alone in its storage, of the
dtype and sizes that the index says, in little-endian bytes that are not compressed; of every other record nothing is
told, and torch has to read it.
Source: APPNOTE.TXT 6.3.10 (zip), torch/serialization.py.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
import pickle
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import numpy as np

from ckptd.checkpoint.directory import Opener
from ckptd.checkpoint.indexing.columns import Index
from ckptd.staging.dtypes import DTYPES, OBJECT, by_code

# Looking for a place costs two short reads; a record that is shorter is rather read as a whole.
RECORD_BYTES_AT_LEAST: Final = 256 * 1024
# Header, pickle and the storage's own header are within the first kilobyte, the directory within the last.
_LOOK_BYTES: Final = 2048

_LOCAL: Final = struct.Struct("<4s5H3L2H")
_CENTRAL: Final = struct.Struct("<4s6H3L5H2L")
_END: Final = struct.Struct("<4s4H2LH")
_LOCATOR64: Final = struct.Struct("<4sLQL")
_END64: Final = struct.Struct("<4sQ2H2L4Q")
_MAX32: Final = 0xFFFFFFFF
_STORAGES: Final = {dtype.storage: dtype.name for dtype in DTYPES if dtype.storage is not None}


def with_places(path: str, index: Index, names: Iterable[int], *, opener: Opener | None = None) -> Index:
    """Return an index that tells the places of large tensors, where it told only those of their records.

    Args:
        path: Directory of the checkpoint.
        index: Of any checkpoint.
        names: Rows of the names that will be read.
        opener: How files are opened; by path if left out.
    """
    wanted = np.zeros(len(index.names), np.bool_)
    wanted[list(names)] = True
    unknown = (index.data_bytes < 0) & wanted[index.item_name] & (index.dtype[index.item_name] != OBJECT)
    items = np.flatnonzero(unknown & (index.record_bytes >= RECORD_BYTES_AT_LEAST))
    if not len(items):
        return index
    data_offset, data_bytes = index.data_offset.copy(), index.data_bytes.copy()
    for file in np.unique(index.item_file[items]).tolist():
        mine = items[index.item_file[items] == file].tolist()
        places = _look(os.path.join(path, index.files[file]), index, mine, opener)
        for item, place in zip(mine, places, strict=True):
            if place is not None:
                data_offset[item], data_bytes[item] = place
    return dataclasses.replace(index, data_offset=data_offset, data_bytes=data_bytes)


def _look(path: str, index: Index, items: Sequence[int], opener: Opener | None) -> list[tuple[int, int] | None]:
    """Return offset and length of the values of each item in a file, or None."""
    places = [(int(index.record_offset[item]), int(index.record_bytes[item])) for item in items]
    try:
        descriptor = (opener or os.open)(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return [None] * len(items)  # the reads to come tell what is wrong with it
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        for begin, nbytes in places:  # the disk works at all of them before the first is waited for
            os.posix_fadvise(descriptor, begin, _LOOK_BYTES, os.POSIX_FADV_WILLNEED)
            os.posix_fadvise(descriptor, begin + nbytes - _LOOK_BYTES, _LOOK_BYTES, os.POSIX_FADV_WILLNEED)
        found: list[tuple[int, int] | None] = []
        for item, (begin, nbytes) in zip(items, places, strict=True):
            row = int(index.item_name[item])
            sizes = tuple(index.item_sizes[item, : index.ndim[row]].tolist())
            head = os.pread(descriptor, _LOOK_BYTES, begin)
            tail = os.pread(descriptor, _LOOK_BYTES, begin + nbytes - _LOOK_BYTES)
            place = place_in_record(head, tail, nbytes, dtype=int(index.dtype[row]), sizes=sizes)
            found.append(None if place is None else (begin + place, math.prod(sizes) * _itemsize(index, row)))
        return found
    except OSError:
        return [None] * len(items)
    finally:
        os.close(descriptor)


def _itemsize(index: Index, row: int) -> int:
    return by_code(int(index.dtype[row])).itemsize_bytes


def place_in_record(head: bytes, tail: bytes, record_bytes: int, *, dtype: int, sizes: tuple[int, ...]) -> int | None:
    """Return where a tensor's values begin in its record, or None if only torch can tell.

    Args:
        head: The record's first bytes.
        tail: Its last bytes.
        record_bytes: Its length.
        dtype: Code that the values must have.
        sizes: Extent that they must have, row-major.
    """
    try:
        files = _directory(tail, record_bytes)
        tensor = _tensor_in(_content(head, files["data.pkl"]))
        known = by_code(dtype)
        if tensor != _Tensor(known.name, sizes, _strides(sizes)):
            return None
        if _content(head, files["byteorder"]) != b"little":
            return None
        data = files["data/0"]
        begin = _begin(head, data)
    except Exception:  # noqa: BLE001  # whatever damaged bytes do to a parser: torch will say what is wrong with them
        return None
    fits = data.nbytes == math.prod(sizes) * known.itemsize_bytes and begin + data.nbytes <= record_bytes
    return begin if fits and data.is_stored else None


# --- the archive -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _File:
    """One file of an archive: where its header begins, and its length."""

    offset: int
    nbytes: int
    is_stored: bool


def _directory(tail: bytes, record_bytes: int) -> dict[str, _File]:
    """Return the files in the directory at an archive's end, by name without the archive's own."""
    at = len(tail) - _END.size
    signature, *_, count, _, offset, comment = _END.unpack_from(tail, at)
    if signature != b"PK\5\6" or comment:
        raise ValueError("no end of an archive")
    if offset == _MAX32:
        signature, _, end64, _ = _LOCATOR64.unpack_from(tail, at - _LOCATOR64.size)
        *_, count, _, offset = _END64.unpack_from(tail, _within(end64 - (record_bytes - len(tail))))
    at = _within(offset - (record_bytes - len(tail)))
    files = {}
    for _ in range(count):
        fields = _CENTRAL.unpack_from(tail, at)
        name_bytes, extra_bytes, comment_bytes = fields[10:13]
        name = tail[at + _CENTRAL.size : at + _CENTRAL.size + name_bytes].decode()
        extra = tail[at + _CENTRAL.size + name_bytes : at + _CENTRAL.size + name_bytes + extra_bytes]
        files[name.partition("/")[2]] = _file(fields, extra)
        at += _CENTRAL.size + name_bytes + extra_bytes + comment_bytes
    return files


def _file(fields: tuple[Any, ...], extra: bytes) -> _File:
    stored, full, offset = fields[8], fields[9], fields[16]
    while extra:  # what does not fit into 32 bits stands in the field with the id 1, in this order: APPNOTE 4.5.3
        kind, nbytes = struct.unpack_from("<2H", extra)
        if kind == 1:
            values = iter(struct.unpack_from(f"<{nbytes // 8}Q", extra, 4))
            full = next(values) if full == _MAX32 else full
            stored = next(values) if stored == _MAX32 else stored
            offset = next(values) if offset == _MAX32 else offset
        extra = extra[4 + nbytes :]
    return _File(offset, full, fields[4] == 0 and stored == full)


def _begin(head: bytes, file: _File) -> int:
    """Return where a file's content begins, from the header before it."""
    signature, *_, name_bytes, extra_bytes = _LOCAL.unpack_from(head, _within(file.offset))
    if signature != b"PK\3\4":
        raise ValueError("no header")
    return file.offset + _LOCAL.size + int(name_bytes) + int(extra_bytes)


def _content(head: bytes, file: _File) -> bytes:
    begin = _begin(head, file)
    if begin + file.nbytes > len(head) or not file.is_stored:
        raise ValueError("too long or compressed")
    return head[begin : begin + file.nbytes]


def _within(offset: int) -> int:
    if offset < 0:  # struct would count from the end
        raise ValueError("outside of what was read")
    return offset


# --- the tensor ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Tensor:
    """What the pickle of a tensor says: name of the dtype, sizes and strides."""

    dtype: str
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


def _strides(sizes: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(sizes):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def _tensor_in(data: bytes) -> _Tensor | None:
    tensor = _Unpickler(data).load()
    return tensor if isinstance(tensor, _Tensor) else None


class _Name(str):
    """The name of something in torch; calling it, which only a forged pickle does, is an error."""

    __slots__ = ()


def _rebuild(storage: Any, _offset: Any, sizes: Any, strides: Any, _grad: Any, _hooks: Any, *rest: Any) -> _Tensor:
    """Stand in for torch._utils._rebuild_tensor_v2 and _v3."""
    dtype = str(rest[0]) if rest else str(storage)
    return _Tensor(dtype, sizes, strides)


class _Unpickler(pickle.Unpickler):
    """Makes nothing but names and :class:`_Tensor`, whatever the pickle says."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))

    def find_class(self, module: str, name: str) -> Any:
        """Return a stand-in; called by the unpickler."""
        if module == "torch._utils" and name in {"_rebuild_tensor_v2", "_rebuild_tensor_v3"}:
            return _rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module in {"torch", "torch.storage"}:
            return _Name(_STORAGES.get(name, name))
        self._refuse(module, name)

    def persistent_load(self, pid: Any) -> str:
        """Return the dtype of a storage by its name; called by the unpickler."""
        kind, dtype, key, *_ = pid
        if kind != "storage" or key != "0":
            raise ValueError("another storage")
        return str(dtype)

    def _refuse(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a tensor")
