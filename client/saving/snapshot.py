"""One look at a state dict: what it holds, as structure, sources and object bytes.

Tensors are looked up anew at every save, so that nothing stale is staged; objects are serialised at once, so that the
trainer may change them after the call.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Final

import numpy as np
import torch
from torch.distributed.checkpoint.stateful import Stateful

from ckptd.checkpoint.planning.chunks import Extent, data_of, is_plain, shape_of, structure_of, written_chunks_of
from ckptd.checkpoint.planning.items import Int64, LocalPlan, UInt8
from ckptd.checkpoint.stock.metadata import dtype_code
from ckptd.client.saving.flatten import Outline, Path, flatten, outline_of, top_level
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
        names: Name of each leaf.
        paths: Path of each leaf.
        values: The leaves.
        sources: What is to be staged, in the plan's item order: a tensor of this process, or an object's bytes.
        capacities: Bytes reserved for each object, by name.
        outline: The containers that the leaves lie in, if the next look can use it.
    """

    structure: Structure
    names: list[str]
    paths: list[Path]
    values: list[Any]
    sources: list[Source]
    capacities: dict[str, int]
    outline: Outline | None = None

    @property
    def leaves(self) -> dict[str, tuple[Path, Any]]:
        """Path and value of each name."""
        return dict(zip(self.names, zip(self.paths, self.values, strict=True), strict=True))

    def devices(self) -> set[torch.device]:
        """Return the accelerators that hold a part of it."""
        return {s.device for s in self.sources if isinstance(s, torch.Tensor) and not s.is_cpu}

    def forget(self) -> Snapshot:
        """Return what the next look needs of this one: all but the values."""
        return replace(self, values=[], sources=[])


def state_of(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict with its Stateful values asked for their state."""
    return {key: value.state_dict() if isinstance(value, Stateful) else value for key, value in state_dict.items()}


def take_snapshot(state_dict: Mapping[str, Any], *, last: Snapshot | None = None, flat: bool = False) -> Snapshot:
    """Look at a state dict; copies no tensor.

    Args:
        state_dict: Nested mappings and lists of tensors and objects.
        last: The snapshot before this one: what it reserved for objects is kept where it still fits, and if nothing
            but values has changed, this look is short.
        flat: Take the top level as it is (DefaultSavePlanner(flatten_state_dict=False)).

    Raises:
        Unsupported: A value cannot be saved; the key is named.
    """
    state = state_of(state_dict)
    if last is not None and last.outline is not None and not flat:
        values = last.outline.leaves_of(state)
        again = None if values is None else _look_again(values, last)
        if again is not None:
            return again
    leaves = top_level(state) if flat else flatten(state)
    structure: list[Any] = []
    sources: list[Source] = []
    reserved: dict[str, int] = {}
    known = {} if last is None else last.capacities
    for name, (path, value) in leaves.items():
        if isinstance(value, torch.Tensor):
            structure.append((path, structure_of(value)))
            sources.extend(data_of(name, value))
            continue
        data = _bytes_of(name, value)
        reserved[name] = _capacity_for(data, known.get(name, 0))
        structure.append((path, reserved[name]))
        sources.append(data)
    paths, values = [path for path, _ in leaves.values()], [value for _, value in leaves.values()]
    outline = None if flat else outline_of(state)
    return Snapshot(tuple(structure), list(leaves), paths, values, sources, reserved, outline)


def _look_again(values: list[Any], last: Snapshot) -> Snapshot | None:
    """Return a snapshot of the same leaves; None if one of them has changed in more than its values."""
    sources: list[Source] = []
    for value, name, (_, known) in zip(values, last.names, last.structure, strict=True):
        kind = type(value)
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            # What structure_of() and data_of() ask of a plain tensor; detach() alone costs as much as all of this.
            same = (value.dtype, value.shape, value.requires_grad) == known
            if not same or value.layout is not torch.strided or value.is_meta or hasattr(value, "global_shape"):
                return None
            sources.append(value)
        elif isinstance(value, torch.Tensor):
            if structure_of(value) != known:
                return None
            sources.extend(data_of(name, value))
        else:
            data = _bytes_of(name, value)
            if _capacity_for(data, last.capacities.get(name, 0)) != known:
                return None
            sources.append(data)
    return replace(last, values=values, sources=sources)


def _capacity_for(data: bytes, reserved: int) -> int:
    """Return the bytes to reserve for an object: those of the last time, unless it has outgrown or long left them."""
    if len(data) <= reserved <= 4 * (len(data) + _SLACK_BYTES):
        return reserved
    return -(-(len(data) + len(data) // 4) // _SLACK_BYTES) * _SLACK_BYTES


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
    for name, value, (_, known) in zip(snapshot.names, snapshot.values, snapshot.structure, strict=True):
        if not isinstance(value, torch.Tensor):
            rows.add(OBJECT, ())
            rows.add_item((), (), known)
        elif is_plain(value):
            # The snapshot has looked at it already: it is all of itself, so one chunk.
            dtype, shape, requires_grad = known
            rows.add(dtype_code(dtype), shape, requires_grad=requires_grad)
            rows.add_item((0,) * len(shape), shape, 0)
        else:
            rows.add(dtype_code(value.dtype), shape_of(value), requires_grad=value.requires_grad)
            for chunk in written_chunks_of(name, value):
                rows.add_item(chunk.offsets, chunk.sizes, 0)
    return rows.plan(settings, snapshot.names, snapshot.paths)


class _Rows:
    """Columns in the making."""

    def __init__(self) -> None:
        self._dtypes: list[int] = []
        self._shapes: list[Extent] = []
        self._grads: list[bool] = []
        self._item_names: list[int] = []
        self._offsets: list[Extent] = []
        self._sizes: list[Extent] = []
        self._capacities: list[int] = []

    def add(self, dtype: int, shape: Extent, *, requires_grad: bool = False) -> None:
        """Add a name: a tensor of which this rank may hold something, or an object."""
        self._dtypes.append(dtype)
        self._shapes.append(shape)
        self._grads.append(requires_grad)

    def add_item(self, offsets: Extent, sizes: Extent, capacity: int) -> None:
        """Add a chunk of the last name's tensor, or the object for which ``capacity`` bytes are reserved."""
        self._item_names.append(len(self._dtypes) - 1)
        self._offsets.append(offsets)
        self._sizes.append(sizes)
        self._capacities.append(capacity)

    def plan(self, settings: str, names: list[str], paths: list[Path]) -> LocalPlan:
        """Return the finished columns."""
        ndim = np.fromiter(map(len, self._shapes), np.uint8, len(names))
        dimensions = int(ndim.max(initial=0))
        item_name = np.array(self._item_names, np.int64)
        return LocalPlan(
            settings=settings,
            names=names,
            paths=paths,
            dtype=np.array(self._dtypes, np.uint8),
            ndim=ndim,
            shape=_matrix(self._shapes, ndim, dimensions),
            requires_grad=np.array(self._grads, np.uint8),
            item_name=item_name,
            item_offsets=_matrix(self._offsets, ndim[item_name], dimensions),
            item_sizes=_matrix(self._sizes, ndim[item_name], dimensions),
            capacity=np.array(self._capacities, np.int64),
        )


def _matrix(boxes: list[Extent], ndim: UInt8, dimensions: int) -> Int64:
    """Return tuples of ``ndim`` integers as a matrix, zero padded."""
    matrix = np.zeros((len(boxes), dimensions), np.int64)
    matrix[np.arange(dimensions) < ndim[:, None]] = np.fromiter(chain.from_iterable(boxes), np.int64)
    return matrix
