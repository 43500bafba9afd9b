"""The bytes around a tensor's data in a stock ``torch.save`` record.

A record is a zip archive. Invariant: everything but the data is a function of dtype and shape, so it is made
once per structure, and stock ``torch.load`` reads ``prefix + data + suffix`` at any place of a file. The CRC
of the data is 0: torch builds its reader, miniz, with MINIZ_DISABLE_ZIP_READER_CRC32_CHECKS.
Sources: APPNOTE.TXT 6.3.10 (zip), torch/serialization.py and torch/_utils.py (the pickle inside).
"""

from __future__ import annotations

import binascii
import math
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from ckptd.protocol.errors import Unsupported
from ckptd.staging.dtypes import by_code

Scalar = int | float | bool | str | None

_LOCAL: Final = struct.Struct("<4s5H3L2H")
_CENTRAL: Final = struct.Struct("<4s6H3L5H2L")
_END64: Final = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64: Final = struct.Struct("<4sLQL")
_END: Final = struct.Struct("<4s4H2LH")
_EXTRA64: Final = struct.Struct("<2H2Q")
# A 32-bit field with this value says "see the zip64 field" (APPNOTE 4.3.9.2).
_MAX32: Final = 0xFFFFFFFF
_VERSION: Final = 20
_VERSION64: Final = 45
_FIRST_DAY: Final = 0x21  # 1980-01-01, the first date that zip can say: a record must not depend on the clock
# 1 to 2 KB each. A model has hundreds of distinct shapes, not thousands.
_CACHED_RECORDS: Final = 8192
_CACHED_SCALARS: Final = 4096
# Longer strings are rare and would let the cache grow to 4096 times their size.
_CACHED_SCALAR_BYTES: Final = 256


@dataclass(frozen=True, slots=True)
class Record:
    """What stands before and behind ``nbytes`` bytes of tensor data."""

    prefix: bytes
    nbytes: int
    suffix: bytes

    @property
    def record_bytes(self) -> int:
        """Length of the whole record, data included."""
        return len(self.prefix) + self.nbytes + len(self.suffix)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One file of the archive."""

    name: bytes
    nbytes: int
    crc32: int

    def _extra64(self) -> bytes:
        return _EXTRA64.pack(1, 16, self.nbytes, self.nbytes) if self.nbytes >= _MAX32 else b""

    def local(self) -> bytes:
        extra = self._extra64()
        version, size = (_VERSION64, _MAX32) if extra else (_VERSION, self.nbytes)
        fixed = _LOCAL.pack(b"PK\3\4", version, 0, 0, 0, _FIRST_DAY, self.crc32, size, size, len(self.name), len(extra))
        return fixed + self.name + extra

    def central(self, offset: int) -> bytes:
        extra = self._extra64()
        version, size = (_VERSION64, _MAX32) if extra else (_VERSION, self.nbytes)
        sizes = (self.crc32, size, size, len(self.name), len(extra))
        fixed = _CENTRAL.pack(b"PK\1\2", version, version, 0, 0, 0, _FIRST_DAY, *sizes, 0, 0, 0, 0, offset)
        return fixed + self.name + extra


def _small_files(pickled: bytes) -> tuple[list[bytes], list[bytes], int]:
    """Return the files of every record: their bytes, their directory entries and where the next begins."""
    files, directory, offset = [], [], 0
    for name, content in ((b"data.pkl", pickled), (b"byteorder", b"little"), (b"version", b"3\n")):
        entry = _Entry(b"archive/" + name, len(content), binascii.crc32(content))
        files.append(entry.local() + content)
        directory.append(entry.central(offset))
        offset += len(files[-1])
    return files, directory, offset


def _archive_end(directory: list[bytes], offset: int) -> bytes:
    """Return the central directory, which begins at ``offset`` of the record, and what follows it."""
    central = b"".join(directory)
    count, size = len(directory), len(central)
    if offset < _MAX32:
        return central + _END.pack(b"PK\5\6", 0, 0, count, count, size, offset, 0)
    end64 = _END64.pack(b"PK\6\6", _END64.size - 12, _VERSION64, _VERSION64, 0, 0, count, count, size, offset)
    locator = _LOCATOR64.pack(b"PK\6\7", 0, offset + size, 1)
    return central + end64 + locator + _END.pack(b"PK\5\6", 0, 0, count, count, size, _MAX32, 0)


def _int(value: int) -> bytes:
    """Return the opcode that torch.save (pickle protocol 2) writes for an int."""
    if 0 <= value < 1 << 8:
        return b"K" + value.to_bytes(1, "little")
    if 0 <= value < 1 << 16:
        return b"M" + value.to_bytes(2, "little")
    if -1 << 31 <= value < 1 << 31:
        return b"J" + value.to_bytes(4, "little", signed=True)
    # Two's complement with room for the sign: -2**n needs as many bits as 2**n - 1, hence the complement.
    length = ((value if value >= 0 else ~value).bit_length() >> 3) + 1
    data = value.to_bytes(length, "little", signed=True)
    return (b"\x8a" + length.to_bytes(1, "little") if length < 256 else b"\x8b" + struct.pack("<i", length)) + data


def _int_tuple(values: tuple[int, ...]) -> bytes:
    if not values:
        return b")"
    opcodes = b"".join(map(_int, values))
    return b"(" + opcodes + b"t" if len(values) > 3 else opcodes + (b"\x85", b"\x86", b"\x87")[len(values) - 1]


def _tensor_pickle(dtype: int, shape: tuple[int, ...]) -> bytes:
    """Return data.pkl of a contiguous CPU tensor, as torch.save writes it but without memoising anything."""
    kind = by_code(dtype)
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)  # torch gives empty tensors the strides of size 1
    elements = math.prod(shape)
    if kind.storage is not None:
        rebuild, storage, length = b"_rebuild_tensor_v2", f"torch\n{kind.storage}", elements
        tail = b""
    else:
        rebuild, storage, length = (
            b"_rebuild_tensor_v3",
            "torch.storage\nUntypedStorage",
            elements * kind.itemsize_bytes,
        )
        tail = f"ctorch\n{kind.name}\n".encode()
    return b"".join(
        (
            b"\x80\x02ctorch._utils\n" + rebuild + b"\n((X\x07\0\0\0storagec" + storage.encode(),
            b"\nX\x01\0\0\x000X\x03\0\0\0cpu" + _int(length) + b"tQK\0",
            _int_tuple(shape) + _int_tuple(tuple(reversed(strides))),
            b"\x89ccollections\nOrderedDict\n)R" + tail + b"tR.",
        )
    )


@lru_cache(maxsize=_CACHED_RECORDS)
def tensor_record(dtype: int, shape: tuple[int, ...]) -> Record:
    """Return the record of a tensor without its data.

    Args:
        dtype: Code of :mod:`ckptd.staging.dtypes`.
        shape: Sizes in elements.

    Returns:
        Prefix and suffix of the C-contiguous data, without padding: who places the record aligns the data.

    Raises:
        Unsupported: No such dtype; convert the tensor first.
    """
    nbytes = math.prod(shape) * by_code(dtype).itemsize_bytes
    files, directory, offset = _small_files(_tensor_pickle(dtype, shape))
    # The data is the last file, so that no local header begins beyond 4 GiB.
    data = _Entry(b"archive/data/0", nbytes, 0)
    prefix = b"".join(files) + data.local()
    directory.append(data.central(offset))
    return Record(prefix, nbytes, _archive_end(directory, len(prefix) + nbytes))


def scalar_record(value: Scalar) -> bytes:
    """Return a whole record that ``torch.load`` reads as this plain value; much faster than ``torch.save``.

    Args:
        value: Exactly of type int, float, bool, str or NoneType. Bits of floats are kept: -0.0 and NaNs too.

    Raises:
        Unsupported: The value is of another type (subclasses too); use ``torch.save``.
    """
    pickled = _scalar_pickle(value)
    if len(pickled) > _CACHED_SCALAR_BYTES:
        return _object_record(pickled)
    return _cached_object_record(pickled)


def scalar_value(data: bytes | memoryview) -> tuple[bool, Scalar]:
    """Return the value in a record of :func:`scalar_record`, executing nothing that stands in it.

    Returns:
        ``(True, value)``, or ``(False, None)`` if these are not exactly the bytes of such a record.
    """
    size_bytes = len(data) - _SCALAR_OVERHEAD_BYTES
    if size_bytes < len(b"\x80\x02N."):
        return False, None
    found, value = _parse_scalar(bytes(data[_SCALAR_PICKLE_AT : _SCALAR_PICKLE_AT + size_bytes]))
    # The pickle tells the value; the rest must be what we would have written for it.
    return (True, value) if found and scalar_record(value) == data else (False, None)


def _scalar_pickle(value: Scalar) -> bytes:
    kind = type(value)
    if kind is bool:
        body = b"\x88" if value else b"\x89"
    elif value is None:
        body = b"N"
    elif kind is int:
        body = _int(value)  # type: ignore[arg-type]
    elif kind is float:
        body = struct.pack(">cd", b"G", value)
    elif kind is str:
        text = value.encode("utf-8", "surrogatepass")  # type: ignore[union-attr]
        if len(text) > _MAX32:
            raise Unsupported(f"a string of {len(text)} bytes", "save it with torch.save")
        body = b"X" + struct.pack("<I", len(text)) + text
    else:
        raise Unsupported(f"a plain value of type {kind.__qualname__}", "save it with torch.save")
    return b"\x80\x02" + body + b"."


def _parse_scalar(pickled: bytes) -> tuple[bool, Scalar]:
    """Return the value that a pickle of one of our opcodes would have if it were well-formed."""
    opcode, body = pickled[2:3], pickled[3:-1]
    match opcode:
        case b"N":
            return True, None
        case b"\x88" | b"\x89":
            return True, opcode == b"\x88"
        case b"K" | b"M":
            return True, int.from_bytes(body, "little")
        case b"J":
            return True, int.from_bytes(body, "little", signed=True)
        case b"\x8a":
            return True, int.from_bytes(body[1:], "little", signed=True)
        case b"\x8b":
            return True, int.from_bytes(body[4:], "little", signed=True)
        case b"G" if len(body) == 8:
            return True, struct.unpack(">d", body)[0]
        case b"X":
            try:
                return True, body[4:].decode("utf-8", "surrogatepass")
            except UnicodeDecodeError:
                return False, None
    return False, None


def _object_record(pickled: bytes) -> bytes:
    files, directory, offset = _small_files(pickled)
    return b"".join(files) + _archive_end(directory, offset)


_cached_object_record: Final = lru_cache(maxsize=_CACHED_SCALARS)(_object_record)
_SCALAR_OVERHEAD_BYTES: Final = len(_object_record(b""))
_SCALAR_PICKLE_AT: Final = len(_Entry(b"archive/data.pkl", 0, 0).local())
