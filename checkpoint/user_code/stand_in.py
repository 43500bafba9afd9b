"""What a planner sees in a worker in the place of a sharded tensor: its global shape, and the shards staged of it.

A worker is in no process group, so there can be no DTensor or ShardedTensor. The stand-in speaks DCP's own protocol for
such tensors (``__create_write_items__``, ``__create_chunk_list__``, ``__get_tensor_shard__``), as those do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from ckptd.checkpoint.planning.chunks import Extent


@dataclass(frozen=True)
class Piece:
    """A part of a tensor as it is staged: a contiguous box of the global shape, in elements."""

    dtype: torch.dtype
    offsets: Extent
    sizes: Extent

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return torch.Size(self.sizes).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Stand:
    """What stands for a tensor in a hand-over: global shape, dtype and pieces; ``whole``: it is not sharded."""

    shape: Extent
    dtype: torch.dtype
    requires_grad: bool
    whole: bool
    pieces: tuple[Piece, ...]


class StagedShards(torch.Tensor):
    """A sharded tensor whose shards are views of a slot; it has a shape and a dtype, but no memory of its own."""

    _shards: list[torch.Tensor]
    _chunks: list[ChunkStorageMetadata]

    @staticmethod
    def __new__(cls: type[StagedShards], stand: Stand, _shards: Sequence[torch.Tensor]) -> StagedShards:
        """Make the empty shell."""
        shell: StagedShards = torch.Tensor._make_wrapper_subclass(
            cls, stand.shape, dtype=stand.dtype, requires_grad=stand.requires_grad
        )
        return shell

    def __init__(self, stand: Stand, shards: Sequence[torch.Tensor]) -> None:
        self._shards = list(shards)
        self._chunks = [ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.sizes)) for p in stand.pieces]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it otherwise than it calls it
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Refuse to compute: the whole tensor is on no machine."""
        if func is torch.ops.aten.is_pinned.default:
            return False
        raise NotImplementedError(f"{func} on a sharded tensor in a worker; use __get_tensor_shard__(index)")

    def __create_write_items__(self, fqn: str, _value: Any) -> list[WriteItem]:
        """Return an item per shard."""
        properties = TensorProperties.create_from_tensor(self)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets, number),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.size()),
            )
            for number, chunk in enumerate(self._chunks)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """Return where the shards lie in the whole."""
        return list(self._chunks)

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        """Return the shard at an index. Raises ValueError if there is none."""
        for number, chunk in enumerate(self._chunks):
            if index.offset == chunk.offsets or (index.offset is None and len(self._chunks) == 1):
                return self._shards[number]
        raise ValueError(f"{index.fqn}: no shard at {index.offset} was staged by this rank")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"StagedShards(shape={tuple(self.size())}, dtype={self.dtype}, shards={len(self._shards)})"
