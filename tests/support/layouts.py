"""The same tensors, laid over ranks in every way that torch and its users know.

A layout builds the state dict of one rank from whole tensors. All layouts hold the same keys and the same values, so
that what one of them saves, each of them can load, and every rank knows what it must find.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from support.states import bits
from torch.distributed._shard.sharded_tensor import Shard as LocalShard
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardMetadata
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper
from torch.distributed.tensor.placement_types import _StridedShard

try:
    from torch.distributed.checkpoint.protocol import CheckpointableTensor
except ImportError:
    CheckpointableTensor = None  # torch before 2.15

# Nothing divides by 2, 3, 4 and 8 alike; "tiny" has fewer rows than there are ranks, "nothing" has none.
SHAPES = {
    "matrix": ((12, 10), torch.float32),
    "odd": ((7, 9), torch.bfloat16),
    "tiny": ((2, 5), torch.int32),
    "vector": ((13,), torch.float64),
    "cube": ((5, 6, 7), torch.float16),
    "experts": ((8, 3, 4), torch.float32),
    "scalar": ((), torch.float32),
    "nothing": ((0, 4), torch.float32),
}
STEP = 17
_PADDING = 0x55


def whole():
    """Return the tensors as they are meant to be: every bit pattern may occur, NaNs of all kinds among them."""
    generator = torch.Generator().manual_seed(7)
    return {key: _random(shape, dtype, generator) for key, (shape, dtype) in SHAPES.items()}


def _random(shape, dtype, generator):
    nbytes = math.prod(shape) * dtype.itemsize
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def blank():
    """Return tensors of the same shapes with other bits."""
    return {key: (bits(value) ^ 0xFF).view(value.dtype).reshape(value.shape) for key, value in whole().items()}


@dataclass(frozen=True)
class Layout:
    """A way to lay tensors over ranks.

    Attributes:
        world_size: How many ranks it takes.
        build: Make the tensor of this rank from key and whole tensor.
        stock: Whether this version of stock understands it.
    """

    world_size: int
    build: Callable[[str, torch.Tensor], torch.Tensor]
    stock: bool = True

    def state(self, full, step=STEP):
        """Return this rank's state dict."""
        return {**{key: self.build(key, value.clone()) for key, value in full.items()}, "step": step}


_meshes: dict[tuple[int, ...], DeviceMesh] = {}


def mesh_of(*shape):
    """Return the mesh of a shape; one per process and shape, because making one is a collective."""
    if shape not in _meshes:
        _meshes[shape] = init_device_mesh("cpu", shape, mesh_dim_names=tuple("abc"[: len(shape)]))
    return _meshes[shape]


def _over_mesh(shape, *placements):
    """Shard over a mesh; a placement for a dimension that a tensor lacks becomes a replica."""

    def build(_key, value):
        fitting = [p if p.is_replicate() or p.dim < value.dim() else Replicate() for p in placements]
        return distribute_tensor(value, mesh_of(*shape), fitting, src_data_rank=None)

    return Layout(math.prod(shape), build)


class Boxes(torch.Tensor):
    """A tensor of a library of its own: it tells DCP by the chunk protocol which boxes of the whole are here."""

    @staticmethod
    def __new__(cls, shape, parts, **_):
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=parts[0][1].dtype if parts else torch.float32)

    def __init__(self, shape, parts, *, written=None):
        self.parts = parts  # pairs of offsets and shard
        self.written = parts if written is None else written  # what of them this rank saves

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"{func} on boxes")

    def __create_write_items__(self, fqn, _value):
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                MetadataIndex(fqn, torch.Size(offsets), number),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(_chunk(offsets, shard), properties, self.size()),
            )
            for number, (offsets, shard) in enumerate(self.written)
        ]

    def __create_chunk_list__(self):
        return [_chunk(offsets, shard) for offsets, shard in self.parts]

    def __get_tensor_shard__(self, index):
        return next(shard for offsets, shard in self.parts if torch.Size(offsets) == index.offset)


def _chunk(offsets, shard):
    return ChunkStorageMetadata(torch.Size(offsets), shard.size())


def _cut(value, offsets, sizes):
    return value[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))].clone()


def _experts(count):
    """Each rank holds every count-th expert, one box each; what has no experts is replicated."""

    def build(key, value):
        if key != "experts":
            return value
        mine = range(dist.get_rank(), value.shape[0], count)
        return Boxes(value.shape, [((e, 0, 0), _cut(value, (e, 0, 0), (1, *value.shape[1:]))) for e in mine])

    return Layout(count, build)


def _tiles(count):
    """Tiles of unlike sizes, several on some ranks and none on others; every rank keeps rank 0's, too."""

    def build(_key, value):
        if value.dim() < 2 or not value.numel():
            return value
        rows, columns = value.shape[:2]
        middle, third = rows // 2, columns // 3
        boxes = [
            ((0, 0), (middle, third)),
            ((0, third), (middle, columns - third)),
            ((middle, 0), (rows - middle, columns - 1)),
            ((middle, columns - 1), (rows - middle, 1)),
        ]
        owners = [0, 1, 1, 0]
        rest = value.shape[2:]
        parts = [
            ((*at, *(0 for _ in rest)), _cut(value, (*at, *(0 for _ in rest)), (*size, *rest))) for at, size in boxes
        ]
        rank = dist.get_rank()
        mine = [part for part, owner in zip(parts, owners, strict=True) if owner == rank]
        held = [part for part, owner in zip(parts, owners, strict=True) if owner in {0, rank}]
        return Boxes(value.shape, held, written=mine)

    return Layout(count, build)


def _uneven_shards(count):
    """A ShardedTensor: rank 0 has the first row and the last, the others share what is between."""

    def build(_key, value):
        if value.dim() == 0 or value.shape[0] < 2:
            return value
        rows = value.shape[0]
        cuts = [
            (0, 1),
            *((1 + (rows - 2) * r // (count - 1), 1 + (rows - 2) * (r + 1) // (count - 1)) for r in range(count - 1)),
        ]
        cuts.append((rows - 1, rows))
        owners = [0, *range(1, count), 0]
        shards = [
            LocalShard(
                value[begin:end].clone(),
                ShardMetadata([begin] + [0] * (value.dim() - 1), [end - begin, *value.shape[1:]], f"rank:{owner}/cpu"),
            )
            for (begin, end), owner in zip(cuts, owners, strict=True)
            if owner == dist.get_rank() and end > begin
        ]
        return ShardedTensor._init_from_local_shards(shards, *value.shape)

    return Layout(count, build)


def _wrapped_shards(count):
    """TorchRec's: a DTensor whose local tensor is a list of shards; rank 0 holds none."""

    def build(_key, value):
        if value.dim() != 2 or value.shape[0] < 2 or value.dtype != torch.float32:
            return value  # torch takes every wrapper for one of float32
        middle = value.shape[0] // 2
        cuts = [(0, middle), (middle, value.shape[0])] if dist.get_rank() == 1 else []
        local = LocalShardsWrapper([value[a:b].clone() for a, b in cuts], [(a, 0) for a, _ in cuts])
        return DTensor.from_local(
            local, mesh_of(count), [Replicate()], run_check=False, shape=value.shape, stride=value.stride()
        )

    return Layout(count, build)


def _fields(count):
    """A plain tensor with torch's fields of a CheckpointableTensor: two slices of the whole in a padded buffer."""

    def build(_key, value):
        if value.dim() == 0 or value.shape[0] < 2 * count:
            return value
        step = -(-value.shape[0] // (2 * count))
        cuts = [(n * step, min((n + 1) * step, value.shape[0])) for n in (dist.get_rank(), dist.get_rank() + count)]
        cuts = [(a, b) for a, b in cuts if a < b]
        room = torch.full((sum(b - a + 1 for a, b in cuts) * value[0].nbytes,), _PADDING, dtype=torch.uint8)
        buffer = room.view(value.dtype).reshape(-1, *value.shape[1:])
        begins, rest = [], value.shape[1:]
        for a, b in cuts:  # a padding row before each slice
            begins.append((begins[-1][0] + begins[-1][1] if begins else 0, b - a + 1))
            buffer[begins[-1][0] + 1 : begins[-1][0] + 1 + b - a] = value[a:b]
        buffer.global_shape = tuple(value.shape)
        buffer.global_offsets = tuple((a, *(0 for _ in rest)) for a, _ in cuts)
        buffer.local_offsets = tuple((begin + 1, *(0 for _ in rest)) for begin, _ in begins)
        buffer.local_sizes = tuple((b - a, *rest) for a, b in cuts)
        return buffer

    return Layout(count, build, stock=CheckpointableTensor is not None)


LAYOUTS = {
    "plain": Layout(1, lambda _key, value: value),
    "rows over 2": _over_mesh((2,), Shard(0)),
    "columns over 2": _over_mesh((2,), Shard(1)),
    "replicas on 2": _over_mesh((2,), Replicate()),
    "wrapped shards on 2": _wrapped_shards(2),
    "slices of buffers on 2": _fields(2),
    "rows over 3": _over_mesh((3,), Shard(0)),
    "columns over 3": _over_mesh((3,), Shard(1)),
    "ShardedTensor on 3": _uneven_shards(3),
    "tiles on 3": _tiles(3),
    "HSDP 2x2": _over_mesh((2, 2), Replicate(), Shard(1)),
    "grid 2x2": _over_mesh((2, 2), Shard(0), Shard(1)),
    "rows twice 2x2": _over_mesh((2, 2), Shard(0), Shard(0)),
    "FSDP and TP 2x2": _over_mesh((2, 2), _StridedShard(0, split_factor=2), Shard(0)),
    "experts on 4": _experts(4),
    "rows over 8": _over_mesh((8,), Shard(0)),
    "grid 2x4": _over_mesh((2, 4), Shard(1), Shard(0)),
    "grid 4x2": _over_mesh((4, 2), Shard(0), Shard(1)),
    "FSDP and TP 2x4": _over_mesh((2, 4), _StridedShard(0, split_factor=4), Shard(0)),
    "HSDP and TP 2x2x2": _over_mesh((2, 2, 2), Replicate(), Shard(0), Shard(1)),
}


def parts_of(value):
    """Return what this rank holds of a tensor, padding and all."""
    if isinstance(value, DTensor):
        value = value._local_tensor
    if isinstance(value, LocalShardsWrapper):
        return value.local_shards()
    if isinstance(value, ShardedTensor):
        return [shard.tensor for shard in value.local_shards()]
    return [shard for _, shard in value.parts] if isinstance(value, Boxes) else [value]


def differences(found, wanted):
    """Return the keys whose bits differ on this rank."""
    wrong = [
        key
        for key in SHAPES
        if any(
            one.shape != other.shape or not torch.equal(bits(one), bits(other))
            for one, other in zip(parts_of(found[key]), parts_of(wanted[key]), strict=True)
        )
    ]
    return wrong + (["step"] if found["step"] != wanted["step"] else [])
