"""Tensors of which a rank holds a part, without a process group, and a job of several ranks that saves them with ckptd.

``python -m benchmarks.shards RANK WORLD_SIZE BYTES TENSORS JOB PATH`` is one rank: it saves its rows and ends.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

_COLUMNS: Final = 1024
_SAVES_WITHIN_S: Final = 600.0
_ROOT: Final = Path(__file__).resolve().parent.parent


class Part(torch.Tensor):
    """One box of a global tensor; tells checkpoints by DCP's protocol, as DTensor does."""

    box: ChunkStorageMetadata
    local: torch.Tensor

    @staticmethod
    def of(shape: tuple[int, int], box: tuple[slice, slice], local: torch.Tensor) -> Part:
        """Return the part of a tensor of ``shape`` that ``local`` holds."""
        part = Part._make_wrapper_subclass(Part, shape, dtype=local.dtype)
        offsets = torch.Size(side.start for side in box)
        part.box, part.local = ChunkStorageMetadata(offsets, local.shape), local
        assert isinstance(part, Part)
        return part

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]  # torch's stub lacks "cls"
        """Refuse to compute: a part is only saved and loaded."""
        raise NotImplementedError(f"{function} of a part")

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """Return where it lies."""
        return [self.box]

    def __create_write_items__(self, fqn: str, part: Part) -> list[WriteItem]:
        """Return what is to be saved."""
        data = TensorWriteData(self.box, TensorProperties(self.dtype), self.size())
        return [WriteItem(MetadataIndex(fqn, self.box.offsets), WriteItemType.SHARD, tensor_data=data)]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        """Return the data."""
        return self.local


def _sides(length: int, rank: int, world_size: int) -> slice:
    return slice(length * rank // world_size, length * (rank + 1) // world_size)


def shape_of(nbytes: int, tensors: int) -> tuple[int, int]:
    """Return the shape of each of so many float32 tensors that have about so many bytes together."""
    return max(8, nbytes // tensors // _COLUMNS // 4), _COLUMNS


def whole(shape: tuple[int, int], number: int) -> torch.Tensor:
    """Return one of the global tensors."""
    return torch.arange(number, number + shape[0] * shape[1], dtype=torch.float32).reshape(shape)


def rows_of(shape: tuple[int, int], tensors: int, rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """Return the rows that a rank of the job that saves holds."""
    box = (_sides(shape[0], rank, world_size), slice(0, shape[1]))
    return {f"layers.{n}": Part.of(shape, box, whole(shape, n)[box].contiguous()) for n in range(tensors)}


def columns_of(shape: tuple[int, int], tensors: int, rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """Return room for the columns that a rank of the job that loads holds; touched, as a model's parameters are."""
    box = (slice(0, shape[0]), _sides(shape[1], rank, world_size))
    width = box[1].stop - box[1].start
    return {f"layers.{n}": Part.of(shape, box, torch.full((shape[0], width), -1.0)) for n in range(tensors)}


def is_loaded(state: dict[str, torch.Tensor], shape: tuple[int, int], rank: int, world_size: int) -> bool:
    """Return whether all columns hold what was saved."""
    side = _sides(shape[1], rank, world_size)
    parts = [part for part in state.values() if isinstance(part, Part)]
    return all(torch.equal(part.local, whole(shape, n)[:, side]) for n, part in enumerate(parts))


def save_as_ranks(path: Path, *, nbytes: int, tensors: int, world_size: int) -> None:
    """Save a checkpoint as a job of ``world_size`` processes. Raises CalledProcessError if one of them fails."""
    fixed = [str(world_size), str(nbytes), str(tensors), f"reshard-{path.name}", str(path)]
    ranks = [
        subprocess.Popen([sys.executable, "-m", "benchmarks.shards", str(rank), *fixed], cwd=_ROOT)
        for rank in range(world_size)
    ]
    try:
        for rank in ranks:
            if rank.wait(_SAVES_WITHIN_S):
                raise subprocess.CalledProcessError(rank.returncode, rank.args)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def main() -> None:
    """Be one rank."""
    rank, world_size, nbytes, tensors = map(int, sys.argv[1:5])
    import ckptd.client as dcp

    torch.set_num_threads(1)
    state = rows_of(shape_of(nbytes, tensors), tensors, rank, world_size)
    session = dcp.connect(job=sys.argv[5], rank=rank, world_size=world_size)
    dcp.save(state, checkpoint_id=sys.argv[6])
    session.close()


if __name__ == "__main__":
    main()
