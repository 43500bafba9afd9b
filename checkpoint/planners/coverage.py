"""Whether the chunks of a plan make up their tensors, and the stored ones what is wanted: no gap, overlap or excess."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from ckptd.checkpoint.planning.tiling import overlaps
from ckptd.protocol.errors import BadPlan, Mismatch


def check_coverage(metadata: Metadata, *, complete: bool) -> None:
    """Refuse chunks that do not tile their tensors. Chunks are sorted first, and only neighbours compared.

    Args:
        metadata: Of the plan that is to be carried out.
        complete: Refuse gaps, too; not for the plan of a rank that saves for itself what others hold the rest of.

    Raises:
        BadPlan: A gap, an overlap, or a chunk that reaches outside; the first key is named, the others are counted.
    """
    wrong = [
        (key, fault)
        for key, value in metadata.state_dict_metadata.items()
        if isinstance(value, TensorStorageMetadata) and (fault := _fault(value, complete=complete))
    ]
    if wrong:
        key, fault = wrong[0]
        raise BadPlan(key, fault if len(wrong) == 1 else f"{fault}; so are {len(wrong) - 1} other tensors of this plan")


def _fault(tensor: TensorStorageMetadata, *, complete: bool) -> str:
    size, chunks = tuple(tensor.size), tensor.chunks
    for chunk in chunks:
        if not _inside(chunk, size):
            return f"a chunk of {tuple(chunk.sizes)} at {tuple(chunk.offsets)} reaches outside the tensor of {size}"
    if len(chunks) > 1 and overlaps(_matrix([c.offsets for c in chunks]), _matrix([c.sizes for c in chunks])):
        return f"{len(chunks)} chunks of the tensor of {size} overlap"
    held, volume = sum(math.prod(chunk.sizes) for chunk in chunks), math.prod(size)
    if complete and held != volume:
        return f"a gap: the ranks hold {held} of {volume} elements of the tensor of {size}"
    return ""


def _inside(chunk: ChunkStorageMetadata, size: tuple[int, ...]) -> bool:
    if not len(chunk.offsets) == len(chunk.sizes) == len(size):
        return False
    spans = zip(chunk.offsets, chunk.sizes, size, strict=True)
    return all(at >= 0 and length >= 0 and at + length <= end for at, length, end in spans)


def _matrix(rows: Sequence[Sequence[int]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array([tuple(row) for row in rows], np.int64).reshape(len(rows), len(rows[0]))


def check_reads(name: str, wanted: Iterable[ChunkStorageMetadata], reads: Iterable[ReadItem]) -> None:
    """Refuse reads that leave a part of what is wanted untouched.

    Args:
        name: The key, for the error.
        wanted: Chunks of the tensor that is to be filled.
        reads: What will be read into it, from chunks that do not overlap.

    Raises:
        Mismatch: The checkpoint does not hold all of it; load another one, or leave the key out.
    """
    need = sum(math.prod(chunk.sizes) for chunk in wanted)
    found = sum(math.prod(read.lengths) for read in reads)
    if found < need:
        raise Mismatch(name, f"{need} elements", f"only {found} of them")
