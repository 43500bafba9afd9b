"""A job's plan as a file next to its arenas: made by one worker, read by all of them, whoever dies in between."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from ckptd.checkpoint.indexing.index import Index, decode_index, encode_index
from ckptd.checkpoint.planning.items import Int64
from ckptd.checkpoint.planning.plan import JobPlan
from ckptd.checkpoint.system import named
from ckptd.protocol.errors import BadMessage
from ckptd.protocol.messages import PlanRanks, encode


class _RankWire(msgspec.Struct, frozen=True, array_like=True):
    data_offset: bytes
    data_bytes: bytes
    is_object: bytes
    index_rows: bytes


class _PlanWire(msgspec.Struct, frozen=True, array_like=True):
    index: bytes
    ranks: list[_RankWire]


@dataclass(frozen=True)
class RankRows:
    """What a worker needs to know of one rank's image; columns in image order, offsets and lengths in bytes."""

    data_offset: Int64
    data_bytes: Int64
    is_object: NDArray[np.bool_]
    index_rows: Int64

    def true_bytes(self, object_bytes: bytes) -> Int64:
        """Return each item's length, with the objects' true ones put in. Raises BadMessage if they do not fit."""
        if len(object_bytes) % 8:
            raise BadMessage(f"lengths of objects in {len(object_bytes)} bytes")
        lengths = np.frombuffer(object_bytes, dtype="<i8")
        reserved = self.data_bytes[self.is_object]
        if len(lengths) != len(reserved) or (lengths < 0).any() or (lengths > reserved).any():
            raise BadMessage("lengths of objects that do not fit the plan")
        result = self.data_bytes.copy()
        result[self.is_object] = lengths
        return result


@dataclass(frozen=True)
class StoredPlan:
    """A plan as read back."""

    index: Index
    ranks: list[RankRows]


def store_plan(path: str, plan: JobPlan) -> None:
    """Write a plan to ``path``; it appears there whole. It lies on tmpfs, so nothing is fsynced.

    Raises:
        SystemCallFailed: It cannot be written.
    """
    ranks = [
        _RankWire(layout.data_offset.tobytes(), layout.data_bytes.tobytes(), objects.tobytes(), rows.tobytes())
        for layout, objects, rows in zip(plan.layouts, plan.is_object, plan.index_rows, strict=True)
    ]
    _store(path, msgspec.msgpack.encode(_PlanWire(encode_index(plan.index), ranks)))


def store_ranks(path: str, ranks: PlanRanks) -> None:
    """Write what a plan was made of to ``path``, as :func:`store_plan` does. Raises SystemCallFailed."""
    _store(path, encode(ranks))


def _store(path: str, data: bytes) -> None:
    temporary = f"{path}.{os.getpid()}"

    def write() -> None:
        with open(temporary, "wb") as file:
            file.write(data)
        os.replace(temporary, path)

    named("write", path, write)


@lru_cache(maxsize=4)
def load_plan(path: str) -> StoredPlan:
    """Return the plan in ``path``. Plan files are never changed, so the last few are kept.

    Raises:
        SystemCallFailed: It cannot be read.
    """
    wire = msgspec.msgpack.decode(named("read", path, Path(path).read_bytes), type=_PlanWire)
    ranks = [
        RankRows(
            np.frombuffer(rank.data_offset, dtype="<i8"),
            np.frombuffer(rank.data_bytes, dtype="<i8"),
            np.frombuffer(rank.is_object, dtype=np.bool_),
            np.frombuffer(rank.index_rows, dtype="<i8"),
        )
        for rank in wire.ranks
    ]
    return StoredPlan(decode_index(wire.index, path), ranks)
