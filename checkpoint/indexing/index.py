"""The index of a checkpoint: what it holds and where, as columns, and its file ``.ckptd``.

The file is a safetensors file: one tensor per column, string tables as blobs with offsets, no pickle.
Invariant: an :class:`Index` that :func:`decode_index` returned can be used without another check; whatever is
wrong with a file is :class:`BadIndex`. The format's version is 1; a reader refuses any other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, NoReturn, TypeVar

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from ckptd.checkpoint.collector import collector_paused
from ckptd.checkpoint.indexing.check import check_columns
from ckptd.checkpoint.indexing.columns import Index, Int64, KeyPath, UInt8
from ckptd.checkpoint.indexing.texts import pack_texts, unpack_texts
from ckptd.protocol.errors import BadIndex, Unsupported

__all__ = ["VERSION", "Index", "check_index", "decode_index", "encode_index"]

VERSION: Final = "1"

# Columns as the file holds them: numpy's type, safetensors' name of it, number of dimensions.
_COLUMNS: Final[dict[str, tuple[str, str, int]]] = {
    "names": ("|u1", "U8", 1),
    "name_ends": ("<i8", "I64", 1),
    "paths": ("|u1", "U8", 1),
    "dtype": ("|u1", "U8", 1),
    "ndim": ("|u1", "U8", 1),
    "shape": ("<i8", "I64", 2),
    "requires_grad": ("|u1", "U8", 1),
    "item_name": ("<i8", "I64", 1),
    "item_offsets": ("<i8", "I64", 2),
    "item_sizes": ("<i8", "I64", 2),
    "files": ("|u1", "U8", 1),
    "file_ends": ("<i8", "I64", 1),
    "item_file": ("<i4", "I32", 1),
    "record_offset": ("<i8", "I64", 1),
    "record_bytes": ("<i8", "I64", 1),
    "data_offset": ("<i8", "I64", 1),
    "data_bytes": ("<i8", "I64", 1),
    "item_hash": ("<u8", "U64", 1),
}
_PATHS: Final = msgspec.msgpack.Decoder(list[KeyPath])
T = TypeVar("T")


def encode_index(index: Index) -> bytes:
    """Return the bytes of ``.ckptd``.

    Raises:
        BadIndex: The index contradicts itself: a bug of whoever made it. Nothing unreadable is ever written.
        Unsupported: A name is not valid Unicode, or a path holds something else than str and int.
    """
    check_index(index, "new index")
    return pack_index(index)


def check_index(index: Index, path: str) -> None:
    """Check that an index can be used: lengths, ranges, order, names.

    Raises:
        BadIndex: It cannot; ``path`` says where it came from.
    """
    reason = check_columns(index)
    if reason is not None:
        raise BadIndex(path, reason)


def pack_index(index: Index) -> bytes:
    """Return the bytes of ``.ckptd`` for an index that was checked."""
    try:
        names, name_ends = pack_texts(index.names)
        files, file_ends = pack_texts(index.files)
    except UnicodeEncodeError as error:
        raise Unsupported(f"the name {error.object!r}", "use names that are valid Unicode") from None
    try:
        paths = msgspec.msgpack.encode(index.paths)
    except (UnicodeEncodeError, TypeError, OverflowError) as error:
        raise Unsupported(f"a path of the state dict ({error})", "use keys of type str") from None
    strings = {"names": names, "name_ends": name_ends, "files": files, "file_ends": file_ends}
    strings["paths"] = np.frombuffer(paths, np.uint8)
    columns = {
        name: np.ascontiguousarray(strings[name] if name in strings else getattr(index, name), numpy_type)
        for name, (numpy_type, _, _) in _COLUMNS.items()
    }
    header = json.dumps(index.header)
    metadata = {"format": "ckptd-index", "version": VERSION, "header": header}
    metadata["xxh3_64"] = _digest(header, columns)
    return _pack(metadata, columns)


def _pack(metadata: dict[str, str], columns: Mapping[str, NDArray[Any]]) -> bytes:
    """Return a safetensors file; copies each column once, where `safetensors.numpy.save` does three times."""
    # The widest first, as safetensors does, so that each begins at a multiple of its width.
    order = sorted(columns, key=lambda name: -columns[name].itemsize)
    header: dict[str, object] = {"__metadata__": metadata}
    begin = 0
    for name in order:
        end = begin + columns[name].nbytes
        header[name] = {"dtype": _COLUMNS[name][1], "shape": columns[name].shape, "data_offsets": (begin, end)}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *(columns[name].reshape(-1).data for name in order)])


def decode_index(data: bytes, path: str) -> Index:
    """Return the index in the bytes of ``.ckptd``. Its columns are read-only views of ``data``.

    Args:
        data: The whole file.
        path: Named in errors.

    Raises:
        BadIndex: Damaged, contradictory, or of another version; load another checkpoint.
    """
    metadata, columns = _unpack(data, path)
    if metadata.get("format") != "ckptd-index" or metadata.get("version") != VERSION:
        found = f"{metadata.get('format')} {metadata.get('version')}"[:80]
        _refuse(path, f"it is not an index of version {VERSION} but {found!r}")
    header = metadata.get("header", "")
    if metadata.get("xxh3_64") != _digest(header, columns):
        _refuse(path, "the index does not match its own hash: it was damaged after it was saved")
    with collector_paused():
        index = Index(
            header=_decoded(path, "header", lambda: msgspec.json.decode(header, type=dict[str, str])),
            names=_unpack_strings(columns["names"], columns["name_ends"], path),
            paths=_decoded(path, "paths", lambda: _PATHS.decode(columns["paths"].data)),
            files=_unpack_strings(columns["files"], columns["file_ends"], path),
            **{name: columns[name] for name in _COLUMNS if name in _ARRAYS},
        )
    check_index(index, path)
    return index


_ARRAYS: Final = set(_COLUMNS) & set(Index.__annotations__) - {"names", "paths", "files"}


class _Tensor(msgspec.Struct, forbid_unknown_fields=True):
    """An entry of a safetensors header."""

    dtype: str
    shape: list[Annotated[int, msgspec.Meta(ge=0, lt=1 << 48)]]
    data_offsets: tuple[Annotated[int, msgspec.Meta(ge=0)], Annotated[int, msgspec.Meta(ge=0)]]


def _unpack(data: bytes, path: str) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    """Return metadata and columns of a safetensors file; each column lies in ``data`` and has its type."""
    header_bytes = int.from_bytes(data[:8], "little")
    begin = 8 + header_bytes
    if len(data) < 8 or begin > len(data):
        _refuse(path, "the header is cut short")
    raw = _decoded(path, "header", lambda: msgspec.json.decode(data[8:begin], type=dict[str, msgspec.Raw]))
    metadata = _decoded(
        path, "metadata", lambda: msgspec.json.decode(raw.pop("__metadata__", b"{}"), type=dict[str, str])
    )
    if set(raw) != set(_COLUMNS):
        _refuse(path, "columns are missing or unknown")
    payload = memoryview(data)[begin:]
    columns = {}
    for name, (numpy_type, type_name, ndim) in _COLUMNS.items():
        tensor = _decoded(path, name, lambda name=name: msgspec.json.decode(raw[name], type=_Tensor))  # type: ignore[misc]
        first, end = tensor.data_offsets
        count = math.prod(tensor.shape)
        nbytes = count * np.dtype(numpy_type).itemsize
        if tensor.dtype != type_name or len(tensor.shape) != ndim or not first <= end <= len(payload):
            _refuse(path, f"column {name} has a wrong type or place")
        if nbytes != end - first:
            _refuse(path, f"column {name} has {end - first} bytes, its shape needs {nbytes}")
        columns[name] = np.frombuffer(payload, numpy_type, count, first).reshape(tensor.shape)
    return metadata, columns


def _digest(header: str, columns: Mapping[str, NDArray[Any]]) -> str:
    """Return the xxh3-64 of the header and of all columns with their shapes, in hex."""
    digest = xxhash.xxh3_64(header.encode("utf-8", "surrogatepass"))
    for name in _COLUMNS:
        column = columns[name]
        digest.update(f"\n{name}{column.shape}\n".encode())
        digest.update(column.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _unpack_strings(blob: UInt8, ends: Int64, path: str) -> list[str]:
    if len(ends) and (ends[0] < 0 or ends[-1] != len(blob) or (ends[1:] < ends[:-1]).any()):
        _refuse(path, "a table of strings has wrong offsets")
    return _decoded(path, "names", lambda: unpack_texts(blob, ends))


def _decoded(path: str, what: str, decode: Callable[[], T]) -> T:
    try:
        return decode()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadIndex(path, f"{what} cannot be decoded: {error}"[:200]) from None


def _refuse(path: str, reason: str) -> NoReturn:
    raise BadIndex(path, reason)
