"""Bytes of tensors as numbers: statistics of one, differences of two. Loads torch for types of 8 bits only."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ckptd.checkpoint.formats.source import Entry, Source
from ckptd.checkpoint.formats.whole import whole
from ckptd.protocol.errors import Unsupported
from ckptd.staging.dtypes import by_code

# Types that numpy knows by torch's name.
NUMPY_TYPES: Final = frozenset(
    {"bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64", "float16", "float32", "float64"}
    | {"complex64", "complex128"}
)
_FLOAT8_BITS: Final = 256


def numbers(data: memoryview, dtype: int) -> NDArray[Any]:
    """Return the values in some bytes of a tensor as an array that numpy can calculate with.

    Raises:
        Unsupported: A packed type, whose bytes are not one number each.
    """
    kind = by_code(dtype)
    if kind.name in NUMPY_TYPES:
        return np.frombuffer(data, kind.name)
    if kind.name == "bfloat16":
        # The upper half of a float32.
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    if kind.name == "complex32":
        return np.frombuffer(data, np.float16).astype(np.float32).view(np.complex64)
    if kind.name.startswith("float8"):
        return _float8_values(kind.name)[np.frombuffer(data, np.uint8)]
    raise Unsupported(f"calculating with {kind.name}", "extract the tensor and use torch")


@lru_cache(maxsize=8)
def _float8_values(name: str) -> NDArray[np.float32]:
    """Return what each byte means; torch knows."""
    import torch

    values: NDArray[np.float32] = (
        torch.arange(_FLOAT8_BITS, dtype=torch.uint8).view(getattr(torch, name)).to(torch.float32).numpy()
    )
    return values


@dataclass
class Statistics:
    """Of a tensor's values, or of the absolute ones of complex numbers; NaNs and infinities are only counted."""

    elements: int = 0
    finite: int = 0
    nan: int = 0
    infinite: int = 0
    zeros: int = 0
    minimum: float = math.inf
    maximum: float = -math.inf
    _sum: float = field(default=0.0, repr=False)
    _squares: float = field(default=0.0, repr=False)

    @property
    def mean(self) -> float | None:
        """Mean of the finite values; None if there are none, or their sum is beyond float64."""
        return self._sum / self.finite if self.finite and math.isfinite(self._sum) else None

    @property
    def std(self) -> float | None:
        """Standard deviation of the finite values (population); None as for the mean."""
        if not self.finite or not math.isfinite(self._squares):
            return None
        mean = self._sum / self.finite
        return math.sqrt(max(self._squares / self.finite - mean * mean, 0.0))

    def add(self, values: NDArray[Any]) -> None:
        """Take some values into account."""
        values = np.abs(values) if np.iscomplexobj(values) else values
        self.elements += values.size
        self.zeros += int((values == 0).sum())
        if values.dtype.kind == "f":
            self.nan += int(np.isnan(values).sum())
            self.infinite += int(np.isinf(values).sum())
            values = values[np.isfinite(values)]
        self.finite += values.size
        if values.size:
            self.minimum = min(self.minimum, values.min().item())
            self.maximum = max(self.maximum, values.max().item())
            wide = values.astype(np.float64)
            with np.errstate(over="ignore"):
                self._sum += float(wide.sum())
                self._squares += float(np.square(wide).sum())

    def facts(self) -> dict[str, int | float | None]:
        """Return all by name, for JSON."""
        return {
            **{"elements": self.elements, "nan": self.nan, "infinite": self.infinite, "zeros": self.zeros},
            "min": self.minimum if self.finite else None,
            "max": self.maximum if self.finite else None,
            "mean": self.mean,
            "std": self.std,
        }


def statistics(source: Source, entry: Entry) -> Statistics:
    """Return the statistics of a tensor; it is read piece by piece. Raises StorageError."""
    result = Statistics()
    for piece in whole(source, entry):
        result.add(numbers(piece, entry.dtype))
    return result


def paired(one: Iterator[memoryview], other: Iterator[memoryview]) -> Iterator[tuple[memoryview, memoryview]]:
    """Yield two streams of the same length as pieces of equal length."""
    left = right = memoryview(b"")
    while True:
        left = left or next(one, left)
        right = right or next(other, right)
        length = min(len(left), len(right))
        if not length:
            return
        yield left[:length], right[:length]
        left, right = left[length:], right[length:]


@dataclass
class Distance:
    """How two tensors of one shape and dtype differ.

    Attributes:
        elements: How many elements differ in their bits.
        largest: Largest absolute difference of two finite elements; None for packed types.
    """

    elements: int = 0
    largest: float | None = 0.0


def distance(entry: Entry, one: Iterator[memoryview], other: Iterator[memoryview]) -> Distance:
    """Return how two streams of an entry's dtype differ; equal pieces cost a comparison of bytes."""
    result = Distance()
    for left, right in paired(one, other):
        if left != right:
            _compare(entry, left, right, result)
    return result


def _compare(entry: Entry, left: memoryview, right: memoryview, result: Distance) -> None:
    shape = (-1, entry.itemsize_bytes)
    differs = (np.frombuffer(left, np.uint8).reshape(shape) != np.frombuffer(right, np.uint8).reshape(shape)).any(
        axis=1
    )
    result.elements += int(differs.sum())
    if result.largest is None:
        return
    try:
        ours, theirs = (numbers(side, entry.dtype)[differs] for side in (left, right))
    except Unsupported:
        result.largest = None
        return
    wide = np.complex128 if np.iscomplexobj(ours) else np.float64
    with np.errstate(invalid="ignore", over="ignore"):
        gaps = np.abs(ours.astype(wide) - theirs.astype(wide))
    result.largest = max(result.largest, float(gaps[np.isfinite(gaps)].max(initial=0.0)))
