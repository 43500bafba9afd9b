"""The element types of tensors, by a code of one byte.

Owns one table; a code is a position in it. Invariant: the table only grows at its end, because codes are
stored in checkpoints. Knows torch's names but does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ckptd.protocol.errors import Unsupported

# Items that are not tensors (torch.save records of any object) have this code in an index.
OBJECT: Final = 255


@dataclass(frozen=True, slots=True)
class DType:
    """One element type.

    Attributes:
        code: Position in :data:`DTYPES`.
        name: As torch spells it after ``torch.``.
        itemsize_bytes: Bytes per element; packed types (``_x2``) count as torch counts them.
        storage: Name of torch's legacy storage class, or None for types that came after those classes.
    """

    code: int
    name: str
    itemsize_bytes: int
    storage: str | None


# Strided tensors of torch 2.9 to 2.13 that torch.save takes. Left out: quantized types (their tensors carry
# more than bytes), int1..int7 and uint1..uint7 (torch.save refuses them), bits* (no operation takes them).
DTYPES: Final[tuple[DType, ...]] = tuple(
    DType(code, name, itemsize_bytes, storage)
    for code, (name, itemsize_bytes, storage) in enumerate(
        (
            ("bool", 1, "BoolStorage"),
            ("uint8", 1, "ByteStorage"),
            ("int8", 1, "CharStorage"),
            ("int16", 2, "ShortStorage"),
            ("int32", 4, "IntStorage"),
            ("int64", 8, "LongStorage"),
            ("uint16", 2, None),
            ("uint32", 4, None),
            ("uint64", 8, None),
            ("float16", 2, "HalfStorage"),
            ("bfloat16", 2, "BFloat16Storage"),
            ("float32", 4, "FloatStorage"),
            ("float64", 8, "DoubleStorage"),
            ("complex32", 4, None),
            ("complex64", 8, "ComplexFloatStorage"),
            ("complex128", 16, "ComplexDoubleStorage"),
            ("float8_e4m3fn", 1, None),
            ("float8_e5m2", 1, None),
            ("float8_e4m3fnuz", 1, None),
            ("float8_e5m2fnuz", 1, None),
            ("float8_e8m0fnu", 1, None),
            ("float4_e2m1fn_x2", 1, None),
        )
    )
)

_BY_NAME: Final = {dtype.name: dtype for dtype in DTYPES}


def by_name(name: str) -> DType:
    """Return the element type of torch's name, without ``torch.``.

    Raises:
        Unsupported: The table has no such type; convert the tensor first.
    """
    dtype = _BY_NAME.get(name)
    if dtype is None:
        raise Unsupported(f"dtype torch.{name}", "convert the tensor to one of " + ", ".join(_BY_NAME))
    return dtype


def by_code(code: int) -> DType:
    """Return the element type of a code.

    Raises:
        Unsupported: The table has no such code; a newer ckptd wrote it, or it is :data:`OBJECT`.
    """
    if not 0 <= code < len(DTYPES):
        raise Unsupported(f"dtype code {code}", "upgrade ckptd (pip install --upgrade ckptd)")
    return DTYPES[code]
