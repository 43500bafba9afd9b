"""What one rank holds, as columns: the local plan. Knows no torch, so that daemon-side planning needs none.

A plan has names (one per tensor or object) and items (one per chunk of a tensor that this rank holds, one per object).
Columns are little-endian numpy arrays; ``D`` is the largest number of dimensions in the plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from ckptd.protocol.errors import BadMessage
from ckptd.staging.dtypes import DTYPES, OBJECT

Int64 = NDArray[np.int64]
UInt8 = NDArray[np.uint8]

# A 1,000-dimensional tensor does not exist (torch stops at 64); a column that claims one is not ours.
MAX_DIMENSIONS: Final = 64

# Planner settings: who writes an item that several ranks hold.
BALANCED: Final = "replicas=balanced"
LOWEST_RANK: Final = "replicas=lowest"


class _Wire(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """The encoded form of :class:`LocalPlan`."""

    settings: str
    names: list[str]
    paths: list[tuple[str | int, ...]]
    dimensions: int
    dtype: bytes
    ndim: bytes
    shape: bytes
    requires_grad: bytes
    item_name: bytes
    item_offsets: bytes
    item_sizes: bytes
    capacity: bytes


@dataclass(frozen=True)
class LocalPlan:
    """The write items of one rank, before replicas are left to their owners.

    Attributes:
        settings: Planner settings that change the outcome; part of the digest.
        names: N fully qualified names, each once.
        paths: N paths, by which a nested state dict is put together again.
        dtype: ``[N]`` code of :mod:`ckptd.staging.dtypes`; ``OBJECT`` for objects.
        ndim: ``[N]`` number of dimensions.
        shape: ``[N, D]`` global shape, zero padded.
        requires_grad: ``[N]`` flag of the tensor.
        item_name: ``[M]`` position in ``names``.
        item_offsets: ``[M, D]`` where the chunk lies in the global tensor, in elements.
        item_sizes: ``[M, D]`` extent of the chunk, in elements.
        capacity: ``[M]`` bytes reserved for an object; 0 for tensors.
    """

    settings: str
    names: list[str]
    paths: list[tuple[str | int, ...]]
    dtype: UInt8
    ndim: UInt8
    shape: Int64
    requires_grad: UInt8
    item_name: Int64
    item_offsets: Int64
    item_sizes: Int64
    capacity: Int64

    @property
    def items(self) -> int:
        """Number of items, M."""
        return len(self.item_name)

    def encode(self) -> bytes:
        """Return the wire form."""
        wire = _Wire(
            self.settings,
            self.names,
            self.paths,
            self.shape.shape[1],
            self.dtype.tobytes(),
            self.ndim.tobytes(),
            self.shape.tobytes(),
            self.requires_grad.tobytes(),
            self.item_name.tobytes(),
            self.item_offsets.tobytes(),
            self.item_sizes.tobytes(),
            self.capacity.tobytes(),
        )
        return msgspec.msgpack.encode(wire)


def decode_plan(data: bytes) -> LocalPlan:
    """Return the plan that :meth:`LocalPlan.encode` made. Raises BadMessage if it is malformed."""
    try:
        wire = msgspec.msgpack.decode(data, type=_Wire)
        plan = _columns(wire)
    except (msgspec.DecodeError, ValueError) as error:
        raise BadMessage(f"a plan: {error}") from None
    _check(plan)
    return plan


def _columns(wire: _Wire) -> LocalPlan:
    def longs(column: bytes) -> Int64:
        return np.frombuffer(column, dtype="<i8")

    if not 0 <= wire.dimensions <= MAX_DIMENSIONS:
        raise ValueError(f"{wire.dimensions} dimensions")
    names, items = len(wire.names), len(wire.item_name) // 8
    return LocalPlan(
        settings=wire.settings,
        names=wire.names,
        paths=wire.paths,
        dtype=np.frombuffer(wire.dtype, dtype=np.uint8),
        ndim=np.frombuffer(wire.ndim, dtype=np.uint8),
        shape=longs(wire.shape).reshape(names, wire.dimensions),
        requires_grad=np.frombuffer(wire.requires_grad, dtype=np.uint8),
        item_name=longs(wire.item_name),
        item_offsets=longs(wire.item_offsets).reshape(items, wire.dimensions),
        item_sizes=longs(wire.item_sizes).reshape(items, wire.dimensions),
        capacity=longs(wire.capacity),
    )


def _check(plan: LocalPlan) -> None:
    names, items = len(plan.names), plan.items
    lengths = {len(plan.paths), len(plan.dtype), len(plan.ndim), len(plan.requires_grad)}
    if lengths - {names} or len(plan.capacity) != items:
        raise BadMessage("a plan whose columns differ in length")
    if items and not (plan.item_name.min() >= 0 and plan.item_name.max() < names):
        raise BadMessage("a plan whose items name nothing")
    if plan.ndim.size and plan.ndim.max() > plan.shape.shape[1]:
        raise BadMessage("a plan with more dimensions than columns")
    if not ((plan.dtype == OBJECT) | (plan.dtype < len(DTYPES))).all():
        raise BadMessage("a plan with an unknown dtype")
    for column in (plan.shape, plan.item_offsets, plan.item_sizes, plan.capacity):
        if column.size and column.min() < 0:
            raise BadMessage("a plan with a negative size")
