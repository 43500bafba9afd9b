"""One look at a state dict: what it holds, as structure, sources and object bytes.

Tensors are looked up anew at every save, so that nothing stale is staged; objects are serialised at once, so that the
trainer may change them after the call.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch.distributed.checkpoint.stateful import Stateful

from ckptd.checkpoint.chunks import Chunk, chunks_of, data_of, structure_of
from ckptd.checkpoint.items import LocalPlan
from ckptd.checkpoint.metadata import dtype_code
from ckptd.client.flatten import Path, flatten, top_level
from ckptd.protocol.errors import Unsupported
from ckptd.staging.dtypes import OBJECT
from ckptd.staging.image import scalar_record

_SCALARS: Final = frozenset({int, float, bool, str, type(None)})
# Objects grow and shrink a little from save to save (step counts, histories); reserving room keeps the layout.
_SLACK_BYTES: Final = 256

Structure = tuple[Any, ...]
Source = torch.Tensor | bytes


@dataclass(frozen=True)
class Snapshot:
    """A flattened state dict.

    Attributes:
        structure: Equal structures have equal plans; compared, never hashed, so that no two can collide.
        leaves: Path and value of each name.
        sources: What is to be staged, in the plan's item order: a tensor of this process, or an object's bytes.
        capacities: Bytes reserved for each object, by name.
    """

    structure: Structure
    leaves: dict[str, tuple[Path, Any]]
    sources: list[Source]
    capacities: dict[str, int]

    def devices(self) -> set[torch.device]:
        """Return the accelerators that hold a part of it."""
        return {s.device for s in self.sources if isinstance(s, torch.Tensor) and s.device.type != "cpu"}


def state_of(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict with its Stateful values asked for their state."""
    return {key: value.state_dict() if isinstance(value, Stateful) else value for key, value in state_dict.items()}


def take_snapshot(state_dict: Mapping[str, Any], *, capacities: Mapping[str, int], flat: bool = False) -> Snapshot:
    """Look at a state dict; copies no tensor.

    Args:
        state_dict: Nested mappings and lists of tensors and objects.
        capacities: What the snapshot before this one reserved for objects; kept where it still fits.
        flat: Take the top level as it is (DefaultSavePlanner(flatten_state_dict=False)).

    Raises:
        Unsupported: A value cannot be saved; the key is named.
    """
    state = state_of(state_dict)
    leaves = top_level(state) if flat else flatten(state)
    structure: list[Any] = []
    sources: list[Source] = []
    reserved: dict[str, int] = {}
    for name, (path, value) in leaves.items():
        if isinstance(value, torch.Tensor):
            structure.append((path, structure_of(value)))
            sources.extend(data_of(name, value))
            continue
        data = _bytes_of(name, value)
        capacity = capacities.get(name, 0)
        if not len(data) <= capacity <= 4 * (len(data) + _SLACK_BYTES):
            capacity = -(-(len(data) + len(data) // 4) // _SLACK_BYTES) * _SLACK_BYTES
        reserved[name] = capacity
        structure.append((path, capacity))
        sources.append(data)
    return Snapshot(tuple(structure), leaves, sources, reserved)


def object_bytes(value: Any) -> bytes:
    """Return the `torch.save` form of anything that is not a tensor."""
    if type(value) in _SCALARS:
        return scalar_record(value)
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _bytes_of(name: str, value: Any) -> bytes:
    try:
        return object_bytes(value)
    except Exception as error:  # whatever pickle, or the object itself, has against it
        what = f"{name}: a {type(value).__name__} that cannot be pickled ({error})"
        raise Unsupported(what, "leave it out of the state dict") from error


def make_local_plan(snapshot: Snapshot, *, settings: str) -> LocalPlan:
    """Return the plan of a snapshot, as columns.

    Args:
        snapshot: What this rank holds.
        settings: Planner settings that change the outcome.
    """
    rows = _Rows()
    for name, (path, value) in snapshot.leaves.items():
        if isinstance(value, torch.Tensor):
            rows.add_tensor(name, path, value)
        else:
            rows.add_object(name, path, snapshot.capacities[name])
    return rows.plan(settings)


class _Rows:
    """Columns in the making."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._paths: list[Path] = []
        self._kinds: list[tuple[int, tuple[int, ...], bool]] = []  # dtype code, shape, requires_grad
        self._items: list[tuple[int, tuple[int, ...], tuple[int, ...], int]] = []

    def add_tensor(self, name: str, path: Path, value: torch.Tensor) -> None:
        """Add a tensor and the chunks of it that this rank holds."""
        position = len(self._names)
        self._names.append(name)
        self._paths.append(path)
        self._kinds.append((dtype_code(value.dtype), tuple(value.size()), value.requires_grad))
        chunks: list[Chunk] = chunks_of(name, value)
        self._items.extend((position, chunk.offsets, chunk.sizes, 0) for chunk in chunks)

    def add_object(self, name: str, path: Path, capacity: int) -> None:
        """Add an object for which ``capacity`` bytes are reserved."""
        self._items.append((len(self._names), (), (), capacity))
        self._names.append(name)
        self._paths.append(path)
        self._kinds.append((OBJECT, (), False))

    def plan(self, settings: str) -> LocalPlan:
        """Return the finished columns."""
        dimensions = max((len(shape) for _, shape, _ in self._kinds), default=0)

        def matrix(rows: list[tuple[int, ...]]) -> np.ndarray[Any, np.dtype[np.int64]]:
            padded = [row + (0,) * (dimensions - len(row)) for row in rows]
            return np.array(padded, dtype=np.int64).reshape(len(rows), dimensions)

        return LocalPlan(
            settings=settings,
            names=self._names,
            paths=self._paths,
            dtype=np.array([kind[0] for kind in self._kinds], dtype=np.uint8),
            ndim=np.array([len(kind[1]) for kind in self._kinds], dtype=np.uint8),
            shape=matrix([kind[1] for kind in self._kinds]),
            requires_grad=np.array([kind[2] for kind in self._kinds], dtype=np.uint8),
            item_name=np.array([item[0] for item in self._items], dtype=np.int64),
            item_offsets=matrix([item[1] for item in self._items]),
            item_sizes=matrix([item[2] for item in self._items]),
            capacity=np.array([item[3] for item in self._items], dtype=np.int64),
        )
