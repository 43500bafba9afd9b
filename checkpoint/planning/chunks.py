"""What part of a global tensor this process holds. The one place that looks at how a tensor is sharded.

Plain tensors, DTensor, ShardedTensor, and the two protocols by which other tensors tell DCP where their parts lie:
``__create_write_items__`` with ``__create_chunk_list__``, and the fields of torch's `CheckpointableTensor`.

Invariant: a chunk's data has the shape of its box. What a tensor says of itself and what it holds are compared, because
a box in the wrong place is a checkpoint that loads without an error and is wrong.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from ckptd.protocol.errors import Unsupported

Extent = tuple[int, ...]

# torch.distributed.checkpoint.protocol.CheckpointableTensor (torch 2.15): fields on any tensor. torch looks for all of
# them with isinstance(), which takes microseconds; few tensors have the first, so asking for it alone is enough.
_FIELDS: Final = ("global_shape", "global_offsets", "local_offsets", "local_sizes")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a global tensor, in elements, and the local tensor that holds it."""

    offsets: Extent
    sizes: Extent
    data: torch.Tensor


def is_plain(value: torch.Tensor) -> bool:
    """Return whether a tensor is all of itself: not sharded, and of no class of its own."""
    kind = type(value)
    return (kind is torch.Tensor or kind is torch.nn.Parameter) and not _has_fields(value)


def shape_of(value: torch.Tensor) -> Extent:
    """Return the global shape, in elements."""
    return tuple(value.global_shape if _has_fields(value) else value.size())  # type: ignore[attr-defined]


def is_meta(value: torch.Tensor) -> bool:
    """Return whether a tensor has no memory yet. A ShardedTensor has; of several shards it does not even answer."""
    return not isinstance(value, ShardedTensor) and value.is_meta


def structure_of(value: Any) -> tuple[Any, ...]:
    """Return what the chunks of a tensor depend on, cheaply: equal structures mean equal chunks."""
    kind = type(value)
    if _has_fields(value):
        fields = (_nested(getattr(value, field)) for field in _FIELDS[1:])
        return (value.dtype, shape_of(value), value.requires_grad, tuple(value.shape), *fields)
    if kind is torch.Tensor or kind is torch.nn.Parameter:
        return (value.dtype, value.shape, value.requires_grad)
    if isinstance(value, DTensor):
        structure = (value.dtype, value.shape, value.requires_grad, value.device_mesh, value.placements)
        local: Any = value._local_tensor
        return (*structure, _boxes(local.__create_chunk_list__())) if _declares(local) else structure
    if isinstance(value, ShardedTensor):
        shards = tuple((tuple(s.metadata.shard_offsets), tuple(s.metadata.shard_sizes)) for s in value.local_shards())
        return (value.dtype, value.size(), shards)
    if hasattr(value, "__create_write_items__"):
        items = value.__create_write_items__("", value)
        boxes = _boxes(item.tensor_data.chunk for item in items if item.tensor_data is not None)
        return (value.dtype, value.shape, value.requires_grad, boxes)
    if _declares(value):
        return (value.dtype, value.shape, value.requires_grad, _boxes(value.__create_chunk_list__()))
    return (value.dtype, value.shape, value.requires_grad, kind)


def chunks_of(name: str, value: torch.Tensor) -> list[Chunk]:
    """Return the chunks of a tensor that this process holds: where a load puts what it reads.

    Args:
        name: The key, for errors.
        value: A tensor of any kind; global shape :func:`shape_of`.

    Returns:
        None, one or several chunks; empty ones of a tensor that is not empty are left out.

    Raises:
        Unsupported: The tensor is not strided, holds no value yet (a partial DTensor, a meta tensor), or holds another
            shape than it says.
    """
    if isinstance(value, DTensor):
        found = _dtensor_chunks(name, value)
    elif _declares(value):
        found = _declared_chunks(name, value)
    elif _has_fields(value):
        found = _field_chunks(name, value)
    elif isinstance(value, ShardedTensor):
        found = [_chunk(name, s.metadata.shard_offsets, s.metadata.shard_sizes, s.tensor) for s in value.local_shards()]
    else:
        found = [Chunk((0,) * value.dim(), tuple(value.shape), _plain(name, value))]
    if 0 in shape_of(value):
        return found[:1]
    return [chunk for chunk in found if 0 not in chunk.sizes]


def written_chunks_of(name: str, value: torch.Tensor) -> list[Chunk]:
    """Return the chunks of a tensor that this process saves. Arguments and errors as :func:`chunks_of`.

    They are other ones only where a tensor's ``__create_write_items__`` says so: a rank may leave to others what it
    holds, too.
    """
    speaker = value._local_tensor if isinstance(value, DTensor) else value
    if not hasattr(speaker, "__create_write_items__"):
        return chunks_of(name, value)
    if isinstance(value, DTensor):
        _check_placements(name, value)
    found = []
    for item in _write_items(name, value):
        told = item.tensor_data
        if tuple(told.size) != shape_of(value):
            what = f"{name}: write items of a tensor of shape {tuple(told.size)} in one of {shape_of(value)}"
            raise Unsupported(what, "have size() and __create_write_items__ tell the same global shape")
        data: torch.Tensor = value.__get_tensor_shard__(item.index)  # type: ignore[attr-defined]
        found.append(_chunk(name, told.chunk.offsets, told.chunk.sizes, data, dtype=value.dtype))
    return found[:1] if 0 in shape_of(value) else [chunk for chunk in found if 0 not in chunk.sizes]


def data_of(name: str, value: torch.Tensor) -> list[torch.Tensor]:
    """Return the data of :func:`written_chunks_of`, in its order, without asking where it lies if that can be."""
    if is_plain(value):
        return [_plain(name, value)]
    if isinstance(value, DTensor) and not _is_strided(value) and not _declares(value._local_tensor) and value.numel():
        local = _local(value)
        return [local] if local.numel() and value.device_mesh.get_coordinate() is not None else []
    return [chunk.data for chunk in written_chunks_of(name, value)]


def _plain(name: str, value: torch.Tensor) -> torch.Tensor:
    if value.layout is not torch.strided:
        raise Unsupported(f"{name}: a tensor of layout {value.layout}", "save value.to_dense() or its parts")
    if value.is_meta:
        raise Unsupported(f"{name}: a meta tensor", "materialise it first")
    if value.is_quantized:
        raise Unsupported(f"{name}: a quantized tensor", "save its int_repr(), scales and zero points")
    return value.detach()


def _chunk(
    name: str, offsets: Iterable[int], sizes: Iterable[int], data: torch.Tensor, *, dtype: torch.dtype | None = None
) -> Chunk:
    """Return a chunk, once its data is seen to be what its box says."""
    chunk = Chunk(tuple(offsets), tuple(sizes), _plain(name, data))
    if tuple(data.shape) != chunk.sizes:
        what = f"{name}: a shard of shape {tuple(data.shape)} that says it has shape {chunk.sizes}"
        raise Unsupported(what, "give the shard without padding, or correct what it says")
    if dtype is not None and data.dtype != dtype:
        raise Unsupported(
            f"{name}: a shard of {data.dtype} in a tensor of {dtype}", "save shards of the tensor's dtype"
        )
    return chunk


# --- DTensor -----------------------------------------------------------------------------------------------------


def _local(value: DTensor) -> torch.Tensor:
    local = value.to_local().detach()
    wait = getattr(local, "wait", None)  # AsyncCollectiveTensor: a redistribution that is still under way
    return wait() if wait is not None else local


def _check_placements(name: str, value: DTensor) -> None:
    if any(placement.is_partial() for placement in value.placements):
        raise Unsupported(f"{name}: a DTensor with a partial placement", "redistribute it first")


def _dtensor_chunks(name: str, value: DTensor) -> list[Chunk]:
    _check_placements(name, value)
    if value.device_mesh.get_coordinate() is None:
        return []  # this rank is not part of the mesh
    if _declares(value._local_tensor):
        return _declared_chunks(name, value)
    local = _local(value)
    if _is_strided(value) and value.numel():
        return _strided_chunks(name, value, local)
    return [_chunk(name, box.offsets, box.sizes, local) for box in value.__create_chunk_list__()]


def _is_strided(value: DTensor) -> bool:
    return any(isinstance(placement, _StridedShard) for placement in value.placements)


def _strided_chunks(name: str, value: DTensor, local: torch.Tensor) -> list[Chunk]:
    """Return a chunk per run of neighbours: a strided shard may be scattered, of which torch tells the first run only.

    Source of the order of splits: the docstrings of `Shard` and `_StridedShard`.
    """
    positions = [list(range(length)) for length in value.shape]
    mesh, coordinate = value.device_mesh, value.device_mesh.get_coordinate()
    assert coordinate is not None
    for placement, count, at in zip(value.placements, mesh.shape, coordinate, strict=True):
        if isinstance(placement, _StridedShard):
            parts = _split(positions[placement.dim], int(placement.split_factor))
            positions[placement.dim] = [p for part in parts for p in _split(part, count)[at]]
        elif isinstance(placement, Shard):
            positions[placement.dim] = _split(positions[placement.dim], count)[at]
    if tuple(map(len, positions)) != tuple(local.shape):
        held = f"{name}: placements {value.placements} that do not give the local shape {tuple(local.shape)}"
        raise Unsupported(held, "make the dimension divisible by the mesh, or redistribute first")
    return [_strided_chunk(name, local, box) for box in itertools.product(*map(_runs, positions))]


def _strided_chunk(name: str, local: torch.Tensor, box: tuple[tuple[int, int, int], ...]) -> Chunk:
    for dimension, (_, begin, length) in enumerate(box):
        local = local.narrow(dimension, begin, length)
    return _chunk(name, (run[0] for run in box), (run[2] for run in box), local)


def _split(positions: list[int], count: int) -> list[list[int]]:
    """Return ``count`` parts as `torch.chunk` makes them; the last ones may be empty."""
    size = -(-len(positions) // count)
    return [positions[part * size : (part + 1) * size] for part in range(count)]


def _runs(positions: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return runs of neighbouring positions: where each begins, its place among the positions, its length."""
    begins = [i for i, at in enumerate(positions) if i == 0 or at != positions[i - 1] + 1]
    return [(positions[begin], begin, end - begin) for begin, end in itertools.pairwise([*begins, len(positions)])]


# --- tensors that tell it themselves -----------------------------------------------------------------------------


def _declares(value: Any) -> bool:
    return hasattr(value, "__create_chunk_list__")


def _declared_chunks(name: str, value: Any) -> list[Chunk]:
    boxes = [(position, box) for position, box in enumerate(value.__create_chunk_list__()) if 0 not in box.sizes]
    return [
        _chunk(name, box.offsets, box.sizes, value.__get_tensor_shard__(MetadataIndex(name, box.offsets, position)))
        for position, box in boxes
    ] or _empty_chunks(name, value)


def _empty_chunks(name: str, value: torch.Tensor) -> list[Chunk]:
    """Return the one chunk of a tensor without elements; none of any other."""
    shape = shape_of(value)
    return [_chunk(name, (0,) * len(shape), shape, torch.empty(shape, dtype=value.dtype))] if 0 in shape else []


def _write_items(name: str, value: Any) -> list[Any]:
    items: list[Any] = list(value.__create_write_items__(name, value))
    if any(item.tensor_data is None or item.index.fqn != name for item in items):
        what = f"{name}: a {type(value).__name__} whose write items are not shards of itself"
        raise Unsupported(what, "save what they stand for under keys of its own")
    return items


def _boxes(boxes: Iterable[Any]) -> tuple[tuple[Extent, Extent], ...]:
    return tuple((tuple(box.offsets), tuple(box.sizes)) for box in boxes)


def _has_fields(value: torch.Tensor) -> bool:
    return hasattr(value, "global_shape") and all(hasattr(value, field) for field in _FIELDS)


def _nested(rows: Iterable[Iterable[int]]) -> tuple[Extent, ...]:
    return tuple(tuple(row) for row in rows)


def _field_chunks(name: str, value: Any) -> list[Chunk]:
    if len({len(value.global_offsets), len(value.local_offsets), len(value.local_sizes)}) != 1:
        what = f"{name}: global_offsets, local_offsets and local_sizes of different length"
        raise Unsupported(what, "give one of each per shard")
    chunks = []
    for offsets, begins, sizes in zip(value.global_offsets, value.local_offsets, value.local_sizes, strict=True):
        data = value
        for dimension, (begin, size) in enumerate(zip(begins, sizes, strict=False)):
            data = data[(slice(None),) * dimension + (slice(begin, begin + size),)]
        chunks.append(_chunk(name, offsets, sizes, data))
    return chunks
