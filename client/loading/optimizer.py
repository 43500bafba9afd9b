"""`load_sharded_optimizer_state_dict`: an FSDP optimizer's state, each rank its own part, allocated and loaded.

The model's state dict tells how parameters are sharded. What is loaded becomes `ShardedTensor`s that are sharded the
same way along dimension 0: over all ranks, or, where the parameters are tensor-parallel as well (a `ShardedTensor` of
`ShardedTensor`s), over the data-parallel group and within this rank's slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as ShardProperties
from torch.distributed._shard.sharding_spec import ChunkShardingSpec
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.distributed_c10d import _get_pg_default_device
from torch.distributed.tensor import DTensor

from ckptd.client.failures import as_checkpoint_failure
from ckptd.client.loading.loader import load
from ckptd.client.session.exchange import Exchange, place_in
from ckptd.protocol.errors import BadIndex, Unsupported, UserCodeFailed

if TYPE_CHECKING:
    from torch.distributed.checkpoint.planner import LoadPlanner
    from torch.distributed.checkpoint.storage import StorageReader


@as_checkpoint_failure()
def load_sharded_optimizer_state_dict(
    model_state_dict: dict[str, Any],
    optimizer_key: str,
    storage_reader: StorageReader,
    planner: LoadPlanner | None = None,
) -> dict[str, Any]:
    """Load the state of a sharded optimizer; the arguments are torch's.

    Args:
        model_state_dict: The model's sharded state dict, which tells how its parameters lie.
        optimizer_key: Top-level key under which the optimizer was saved.
        storage_reader: Where the checkpoint is.
        planner: How to load; left aside for tensor-parallel parameters, as torch does.

    Returns:
        ``{optimizer_key: state}``: tensors of one element as they are, all others as `ShardedTensor`s of which this
        rank holds its part, and everything else.

    Raises:
        Unsupported: There is no process group, or parameters are sharded in a way that is not understood.
        CkptdError: As :func:`ckptd.client.load`.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise Unsupported("load_sharded_optimizer_state_dict without a process group", "use load() on one process")
    slices = _Slices(model_state_dict)
    metadata = _read_metadata(storage_reader)
    paths: dict[str, tuple[str | int, ...]] = {
        name: tuple(path) for name, path in (metadata.planner_data or {}).items() if path[0] == optimizer_key
    }
    made = {name: _target(name, path, metadata.state_dict_metadata[name], slices) for name, path in paths.items()}
    flat: dict[str, Any] = {name: target.value for name, target in made.items()}
    load(flat, storage_reader=storage_reader, planner=None if slices.group is not None else planner)
    state: dict[str, Any] = {}
    for name, path in paths.items():
        sharded = made[name].sharded
        _put(state, path, flat[name] if sharded is None else sharded)
    return state


def _read_metadata(reader: StorageReader) -> Metadata:
    """Return the checkpoint's metadata; a rank that cannot read it tells the others."""
    found: list[Metadata] = []
    place = place_in(None, no_dist=False)

    def read() -> bytes:
        try:
            found.append(reader.read_metadata())
        except Exception as error:
            where = f"{type(reader).__name__}.read_metadata"
            raise UserCodeFailed(place.rank, where, f"{type(error).__name__}: {error}") from error
        return b""

    with Exchange(place) as exchange:
        exchange.together("reading metadata", read)
    return found[0]


class _Slices:
    """Which slice of each parameter this rank's data-parallel group holds.

    Attributes:
        group: The ranks over which dimension 0 is sharded; None is all ranks.
        device: Type of the device that their tensors are on.
    """

    def __init__(self, model_state_dict: dict[str, Any]) -> None:
        self.group: dist.ProcessGroup | None = None
        self._boxes: dict[str, tuple[Sequence[int] | None, Sequence[int]]] = {}
        for name, value in model_state_dict.items():
            inner = _nested(name, value)
            if inner is None:
                self._boxes[name] = (None, tuple(value.size()))
            else:
                box, tensor = inner
                self._boxes[name] = (box.shard_offsets, box.shard_sizes)
                self.group = tensor._process_group
        self.device = _get_pg_default_device(self.group).type

    def box(self, name: str, size: Sequence[int]) -> tuple[Sequence[int] | None, Sequence[int]]:
        """Return offsets (None: the whole tensor) and sizes of the slice of a parameter's state."""
        return self._boxes.get(name, (None, size)) if self.group is not None else (None, size)

    def placements(self) -> list[str]:
        """Return where the shards lie, in the order of the group's ranks."""
        count = torch.get_device_module(self.device).device_count()
        # Global ranks: a group's own numbers, which torch takes here, are refused by ShardedTensor (torch 2.13).
        ranks = dist.get_process_group_ranks(self.group or dist.group.WORLD)
        on_cpu = self.device == "cpu" or not count
        return [f"rank:{rank}/cpu" if on_cpu else f"rank:{rank}/{self.device}:{rank % count}" for rank in ranks]


def _nested(name: str, value: Any) -> tuple[ShardMetadata, ShardedTensor] | None:
    """Return the one shard of a tensor-parallel parameter that is sharded in itself; None for any other."""
    if isinstance(value, DTensor) and isinstance(value._local_tensor, DTensor | ShardedTensor):
        raise Unsupported(f"{name}: a DTensor of {type(value._local_tensor).__name__}", "shard it over one mesh")
    if not isinstance(value, ShardedTensor) or not value.local_shards():
        return None
    shards = value.local_shards()
    if isinstance(shards[0].tensor, DTensor):
        raise Unsupported(f"{name}: a ShardedTensor of DTensors", "shard it over one mesh")
    if not isinstance(shards[0].tensor, ShardedTensor):
        return None
    if len(shards) != 1:
        raise Unsupported(f"{name}: {len(shards)} shards on one rank", "give each rank one")
    return shards[0].metadata, shards[0].tensor


@dataclass(frozen=True)
class _Target:
    """What a name is loaded into, and the sharded tensor that the caller gets for it, if it is another one."""

    value: Any
    sharded: ShardedTensor | None = None


def _target(name: str, path: tuple[str | int, ...], stored: object, slices: _Slices) -> _Target:
    if isinstance(stored, BytesStorageMetadata):
        return _Target(None)  # replaced by what is loaded
    if not isinstance(stored, TensorStorageMetadata):
        raise BadIndex(name, f"metadata of type {type(stored).__name__}")
    if stored.size.numel() == 1:
        return _Target(_allocate(stored, stored.size, slices.device))
    offsets, size = slices.box(str(path[2]) if len(path) > 2 else "", stored.size)
    metadata = _shards(stored, size, slices)
    rank = dist.get_rank()
    mine = [shard for shard in metadata.shards_metadata if cast(Any, shard.placement).rank() == rank]
    local = [Shard(_allocate(stored, shard.shard_sizes, slices.device), shard) for shard in mine]
    sharded = ShardedTensor._init_from_local_shards_and_global_metadata(
        local, metadata, process_group=slices.group or dist.group.WORLD
    )
    return _Target(_Window.of(stored, local, offsets or [0] * len(size)), sharded)


def _shards(stored: TensorStorageMetadata, size: Sequence[int], slices: _Slices) -> ShardedTensorMetadata:
    """Return how a tensor is sharded along dimension 0, with torch's own rules."""
    properties = ShardProperties(
        dtype=stored.properties.dtype,
        layout=stored.properties.layout,
        requires_grad=slices.group is not None and stored.properties.requires_grad,
        memory_format=stored.properties.memory_format,
        pin_memory=stored.properties.pin_memory,
    )
    spec = ChunkShardingSpec(dim=0, placements=cast(Any, slices.placements()))
    metadata = spec.build_metadata(torch.Size(size), properties)
    if slices.group is None:  # of all ranks, those that would hold nothing are left out
        metadata.shards_metadata = [shard for shard in metadata.shards_metadata if shard.shard_sizes[0]]
    return metadata


def _allocate(stored: TensorStorageMetadata, size: Sequence[int], device: str) -> torch.Tensor:
    properties = stored.properties
    return torch.empty(
        tuple(size),
        dtype=properties.dtype,
        layout=properties.layout,
        requires_grad=properties.requires_grad,
        pin_memory=properties.pin_memory,
        device="cpu" if device == "cpu" else torch.device(device, torch.get_device_module(device).current_device()),
    )


class _Window(torch.Tensor):
    """A tensor as it was saved, of which this process holds some boxes. Speaks DCP's protocol of checkpointables."""

    _shards: list[Shard]
    _offsets: Sequence[int]

    @staticmethod
    def of(stored: TensorStorageMetadata, shards: list[Shard], offsets: Sequence[int]) -> _Window:
        """Return a window on a saved tensor.

        Args:
            stored: The tensor.
            shards: What this process holds.
            offsets: Where the tensor that is made of all such shards begins in the saved one, in elements.
        """
        window: _Window = torch.Tensor._make_wrapper_subclass(_Window, stored.size, dtype=stored.properties.dtype)
        window._shards, window._offsets = shards, offsets
        return window

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub is that of a method, torch wants a class method
        cls, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        """There is nothing here to compute with."""
        del types, arguments, options
        raise NotImplementedError(f"{function} of a window on a saved tensor")

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(torch.Size(self._place(shard)), torch.Size(shard.metadata.shard_sizes))
            for shard in self._shards
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        for shard in self._shards:
            if index.offset is None or tuple(index.offset) == self._place(shard):
                return shard.tensor
        raise BadIndex(index.fqn, f"no shard at {index.offset}")

    def _place(self, shard: Shard) -> tuple[int, ...]:
        return tuple(a + b for a, b in zip(shard.metadata.shard_offsets, self._offsets, strict=True))


def _put(state: Any, path: tuple[str | int, ...], value: Any) -> None:
    """Put a value into nested mappings and lists, which are made as they are needed."""
    for step, following in pairwise(path):
        state = _grown(state, step, [] if isinstance(following, int) else {})
    _grown(state, path[-1], None)
    state[path[-1]] = value


def _grown(state: Any, step: str | int, fresh: Any) -> Any:
    """Return what is at a step of a container, which first gets something fresh there if it has nothing yet."""
    if isinstance(state, list):
        state.extend([None] * (int(step) + 1 - len(state)))
        if state[int(step)] is None:
            state[int(step)] = fresh
        return state[int(step)]
    return state.setdefault(step, fresh)
