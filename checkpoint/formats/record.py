"""A tensor in a ``torch.save`` record, as stock writes one for each chunk: where its values lie. Knows no torch.

The record is a zip archive with a pickle in it. Nothing of the pickle is executed: the few names that a tensor's has
are given stand-ins, and any other is refused. The pickle is read by Python's own unpickler, whose memo is a dict: one
that claims a billionth entry costs nothing.
Sources: torch/serialization.py and torch/_utils.py of torch 2.13 (``_rebuild_tensor_v2``, ``_rebuild_tensor_v3``).
"""

from __future__ import annotations

import io
import math
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, Final

from ckptd.checkpoint.system import named
from ckptd.protocol.errors import BadIndex, TruncatedFile, Unsupported
from ckptd.staging.dtypes import DTYPES, by_name

_LOCAL_HEADER_BYTES: Final = 30
# A tensor's pickle has some 200 bytes; 64 dimensions make it one KiB.
_MAX_PICKLE_BYTES: Final = 64 << 10
_STORAGES: Final = {kind.storage: kind.code for kind in DTYPES if kind.storage is not None}
_MALFORMED: Final = (
    *(zipfile.BadZipFile, pickle.UnpicklingError, NotImplementedError, ArithmeticError, AttributeError, EOFError),
    *(LookupError, RecursionError, TypeError, ValueError, MemoryError),
)


@dataclass(frozen=True)
class StoredTensor:
    """Where a record's tensor lies.

    Attributes:
        dtype: Code of :mod:`ckptd.staging.dtypes`.
        shape: In elements.
        strides: In elements.
        data_offset: First byte of the first element in the file.
        storage: First byte and length of the whole storage in the file.
    """

    dtype: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    data_offset: int
    storage: tuple[int, int]

    @property
    def is_contiguous(self) -> bool:
        """Whether the values lie in C order, without gaps."""
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != step:
                return math.prod(self.shape) == 0
            step *= size
        return True


class Window(io.RawIOBase):
    """A range of an open file, as a file of its own."""

    def __init__(self, descriptor: int, path: str, begin: int, nbytes: int) -> None:
        super().__init__()
        self._descriptor, self._path, self._begin, self._nbytes = descriptor, path, begin, nbytes
        self._at = 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go somewhere; returns the new position."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._nbytes}[whence]
        if base + offset < 0:
            raise ValueError("before the beginning")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Read at most what the window holds."""
        target = memoryview(buffer).cast("B")
        target = target[: max(0, min(len(target), self._nbytes - self._at))]
        if target:
            read_exactly(self._descriptor, self._path, self._begin + self._at, target)
        self._at += len(target)
        return len(target)


def read_exactly(descriptor: int, path: str, offset: int, target: memoryview) -> None:
    """Fill ``target`` from a place of a file. Raises TruncatedFile, or SystemCallFailed."""
    done = 0
    while done < len(target):
        rest = target[done:]
        got = named("preadv", path, lambda rest=rest, at=offset + done: os.preadv(descriptor, [rest], at))  # type: ignore[misc]
        if got == 0:
            raise TruncatedFile(path, offset + len(target), offset + done)
        done += got


def tensor_in_record(descriptor: int, path: str, offset: int, nbytes: int) -> StoredTensor:
    """Find the values in a record.

    Args:
        descriptor: The open file.
        path: Its name, for errors.
        offset: Where the record begins, in bytes.
        nbytes: Its length.

    Raises:
        BadIndex: There is no tensor's record.
        Unsupported: A conjugate or negative view, or of another byte order: only torch can read it.
        TruncatedFile, SystemCallFailed: It cannot be read.
    """
    window: IO[bytes] = io.BufferedReader(Window(descriptor, path, offset, nbytes), 4096)
    try:
        with zipfile.ZipFile(window) as archive:
            members = stored_members(archive)
            if members["data.pkl"].file_size > _MAX_PICKLE_BYTES:
                raise ValueError("its pickle is too long")
            if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
                raise Unsupported(f"{path}: a record in big-endian order", "load it with torch")
            tensor = _Unpickler(archive.read(members["data.pkl"])).load()
            if not isinstance(tensor, _Tensor):
                raise TypeError("it holds no tensor")
            storage = members[f"data/{tensor.storage.key}"]
            return _place(tensor, offset + _data_offset(window, storage), storage.file_size, (offset, nbytes))
    except _MALFORMED as error:
        reason = f"the record at offset {offset} cannot be read ({type(error).__name__}: {error})"
        raise BadIndex(path, reason[:200]) from None


def stored_members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return an archive's members by their names without the folder that all of them are in.

    Raises:
        ValueError: One is compressed or encrypted, as torch's never are.
    """
    for member in archive.infolist():
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise ValueError(f"{member.filename} is compressed or encrypted")
    return {member.filename.partition("/")[2]: member for member in archive.infolist()}


def _data_offset(window: IO[bytes], member: zipfile.ZipInfo) -> int:
    window.seek(member.header_offset)
    header = window.read(_LOCAL_HEADER_BYTES)
    if len(header) != _LOCAL_HEADER_BYTES:
        raise EOFError("a header is cut short")
    return member.header_offset + len(header) + sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))


def _place(tensor: _Tensor, begin: int, storage_bytes: int, record: tuple[int, int]) -> StoredTensor:
    """Check a tensor against the bytes that are there."""
    itemsize = DTYPES[tensor.dtype].itemsize_bytes
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    if 0 not in tensor.shape and (last + 1) * itemsize > storage_bytes:
        raise ValueError("the tensor is larger than its storage")
    if begin + storage_bytes > sum(record):
        raise ValueError("the storage reaches beyond the record")
    first = begin + tensor.offset * itemsize
    return StoredTensor(tensor.dtype, tensor.shape, tensor.strides, first, (begin, storage_bytes))


@dataclass(frozen=True)
class _Storage:
    dtype: int | None
    key: str


@dataclass(frozen=True)
class _Tensor:
    dtype: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    storage: _Storage


def _sizes(values: object) -> tuple[int, ...]:
    if type(values) is not tuple or any(type(value) is not int or value < 0 for value in values):
        raise TypeError("a shape that is none")
    return values


def _rebuild(storage: object, offset: object, shape: object, strides: object, *rest: object) -> _Tensor:
    """Stand in for ``_rebuild_tensor_v2`` (gradient flag, hooks, metadata) and ``_v3`` (and a dtype)."""
    dtype = next((value.code for value in rest if isinstance(value, _DType)), None)
    if not isinstance(storage, _Storage) or type(offset) is not int or offset < 0:
        raise TypeError("a tensor without a storage")
    dtype = storage.dtype if dtype is None else dtype
    sizes, steps = _sizes(shape), _sizes(strides)
    if dtype is None or len(sizes) != len(steps):
        raise TypeError("a tensor without a type")
    if len(rest) > 2 and isinstance(rest[-1], dict) and rest[-1]:
        raise Unsupported("a conjugate or negative view", "resolve it before it is saved")
    return _Tensor(dtype, sizes, steps, offset, storage)


@dataclass(frozen=True)
class _DType:
    code: int


class _Unpickler(pickle._Unpickler):
    """Python's unpickler, confined to what a tensor's pickle names."""

    _KNOWN: Final[dict[tuple[str, str], Callable[..., object]]] = {
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
        ("torch._utils", "_rebuild_tensor_v3"): _rebuild,
        ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
        ("collections", "OrderedDict"): lambda: {},
    }

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))

    def find_class(self, module: str, name: str) -> Any:
        """Return a stand-in; called by the unpickler."""
        found = self._KNOWN.get((module, name))
        if found is not None:
            return found
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return _Storage(None, "")
        if module == "torch" and name in _STORAGES:
            return _Storage(_STORAGES[name], "")
        if module == "torch":
            return _DType(by_name(name).code)
        raise pickle.UnpicklingError(f"it wants the forbidden class {module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        """Return a stand-in for a storage; called by the unpickler."""
        kind, storage, key = pid[:3]
        if kind != "storage" or not isinstance(storage, _Storage) or not isinstance(key, str):
            raise pickle.UnpicklingError("a storage that is none")
        return _Storage(storage.dtype, key)
