"""What part of a global tensor this process holds. The one place that looks at how a tensor is sharded.

Plain tensors, DTensor, ShardedTensor, and whoever speaks DCP's ``__create_chunk_list__``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.tensor import DTensor

from ckptd.protocol.errors import Unsupported

Extent = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a global tensor, in elements, and the local tensor that holds it."""

    offsets: Extent
    sizes: Extent
    data: torch.Tensor


def structure_of(value: torch.Tensor) -> tuple[Any, ...]:
    """Return what the chunks of a tensor depend on, cheaply: equal structures mean equal chunks."""
    kind = type(value)
    if kind is torch.Tensor or kind is torch.nn.Parameter:
        return (value.dtype, value.shape, value.requires_grad)
    if isinstance(value, DTensor):
        return (value.dtype, value.shape, value.requires_grad, value.device_mesh, value.placements)
    if isinstance(value, ShardedTensor):
        shards = tuple((tuple(s.metadata.shard_offsets), tuple(s.metadata.shard_sizes)) for s in value.local_shards())
        return (value.dtype, value.size(), shards)
    if hasattr(value, "__create_chunk_list__"):
        boxes = tuple((tuple(c.offsets), tuple(c.sizes)) for c in value.__create_chunk_list__())
        return (value.dtype, value.shape, value.requires_grad, boxes)
    return (value.dtype, value.shape, value.requires_grad, kind)


def chunks_of(name: str, value: torch.Tensor) -> list[Chunk]:
    """Return the chunks of a tensor that this process holds.

    Args:
        name: The key, for errors.
        value: A tensor of any kind; global shape ``value.size()``.

    Returns:
        None, one or several chunks; empty ones of a tensor that is not empty are left out.

    Raises:
        Unsupported: The tensor is not strided, or holds no value yet (a partial DTensor, a meta tensor).
    """
    if isinstance(value, DTensor):
        found = _dtensor_chunks(name, value)
    elif isinstance(value, ShardedTensor):
        found = [
            Chunk(tuple(s.metadata.shard_offsets), tuple(s.metadata.shard_sizes), s.tensor)
            for s in value.local_shards()
        ]
    elif hasattr(value, "__create_chunk_list__"):
        found = _declared_chunks(name, value)
    else:
        found = [Chunk((0,) * value.dim(), tuple(value.shape), _plain(name, value))]
    if value.numel() == 0:
        return found[:1]
    return [chunk for chunk in found if 0 not in chunk.sizes]


def data_of(name: str, value: torch.Tensor) -> list[torch.Tensor]:
    """Return the local tensors of the chunks, in the order of :func:`chunks_of`, without asking where they lie."""
    kind = type(value)
    if kind is torch.Tensor or kind is torch.nn.Parameter:
        return [_plain(name, value)]
    if isinstance(value, DTensor) and value.numel():
        local = _local(value)
        return [local] if local.numel() and value.device_mesh.get_coordinate() is not None else []
    return [chunk.data for chunk in chunks_of(name, value)]


def _plain(name: str, value: torch.Tensor) -> torch.Tensor:
    if value.layout is not torch.strided:
        raise Unsupported(f"{name}: a tensor of layout {value.layout}", "save value.to_dense() or its parts")
    if value.is_meta:
        raise Unsupported(f"{name}: a meta tensor", "materialise it first")
    if value.is_quantized:
        raise Unsupported(f"{name}: a quantized tensor", "save its int_repr(), scales and zero points")
    return value.detach()


def _local(value: DTensor) -> torch.Tensor:
    local = value.to_local().detach()
    wait = getattr(local, "wait", None)  # AsyncCollectiveTensor: a redistribution that is still under way
    return wait() if wait is not None else local


def _dtensor_chunks(name: str, value: DTensor) -> list[Chunk]:
    if any(placement.is_partial() for placement in value.placements):
        raise Unsupported(f"{name}: a DTensor with a partial placement", "redistribute it first")
    if value.device_mesh.get_coordinate() is None:
        return []  # this rank is not part of the mesh
    local = _plain(name, _local(value))
    return [Chunk(tuple(box.offsets), tuple(box.sizes), local) for box in value.__create_chunk_list__()]


def _declared_chunks(name: str, value: Any) -> list[Chunk]:
    return [
        Chunk(
            tuple(box.offsets),
            tuple(box.sizes),
            _plain(name, value.__get_tensor_shard__(MetadataIndex(name, box.offsets, position))),
        )
        for position, box in enumerate(value.__create_chunk_list__())
    ]
