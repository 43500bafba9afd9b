"""Whether chunks tile their tensors: no gap, no overlap, nothing outside. Pure arithmetic on columns.

Chunks inside the tensor whose volumes add up to its volume and of which no two overlap leave no gap; so volumes are
added for all tensors at once, and only tensors of several chunks are looked at pair by pair.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ckptd.checkpoint.planning.items import Int64
from ckptd.protocol.errors import BadPlan

Chunks = tuple[Int64, Int64, Int64]  # name [M], offsets [M, D], sizes [M, D]


def check_tiling(names: list[str], shape: Int64, ndim: NDArray[np.uint8], chunks: Chunks) -> None:
    """Refuse chunks that do not tile their tensors.

    Args:
        names: N names, for the error.
        shape: ``[N, D]`` global shapes, zero padded.
        ndim: ``[N]`` number of dimensions; 0-d tensors and objects have one chunk.
        chunks: Position of the name, offsets and sizes of each chunk, in elements.

    Raises:
        BadPlan: A gap, an overlap, or a chunk that reaches outside; the key is named.
    """
    name, offsets, sizes = chunks
    if not names:
        return
    used = np.arange(shape.shape[1])[None, :] < ndim[:, None]
    outside = (used[name] & (offsets + sizes > shape[name])).any(axis=1)
    if outside.any():
        raise BadPlan(names[name[np.flatnonzero(outside)[0]]], "a chunk reaches outside the tensor")
    volume = np.where(used, shape, 1).prod(axis=1)
    held = np.zeros(len(names), np.int64)
    np.add.at(held, name, np.where(used[name], sizes, 1).prod(axis=1))
    count = np.bincount(name, minlength=len(names))
    by_name = np.argsort(name, kind="stable")
    ends = np.cumsum(count)
    for several in np.flatnonzero(count > 1).tolist():
        mine = by_name[ends[several] - count[several] : ends[several]]
        width = int(ndim[several])
        if overlaps(offsets[mine, :width], sizes[mine, :width]):
            raise BadPlan(names[several], "chunks overlap")
    wrong = np.flatnonzero((held != volume) | (count == 0))
    if len(wrong):
        at = int(wrong[0])
        raise BadPlan(names[at], f"a gap: the ranks hold {held[at]} of {volume[at]} elements")


def overlaps(offsets: Int64, sizes: Int64) -> bool:
    """Return whether any two of the boxes share an element.

    Args:
        offsets: ``[K, D]`` lower corners.
        sizes: ``[K, D]`` extents; an empty box overlaps nothing.
    """
    solid = (sizes > 0).all(axis=1)
    offsets, sizes = offsets[solid], sizes[solid]
    if len(offsets) < 2:
        return False
    if offsets.shape[1] == 0:
        return True
    sweep = int(np.argmax([len(np.unique(offsets[:, d])) for d in range(offsets.shape[1])]))
    order = np.argsort(offsets[:, sweep], kind="stable")
    offsets, ends = offsets[order], (offsets + sizes)[order]
    # Only boxes that begin before this one ends can overlap it.
    reach = np.searchsorted(offsets[:, sweep], ends[:, sweep], side="left")
    for at in np.flatnonzero(reach > np.arange(1, len(reach) + 1)).tolist():
        others = slice(at + 1, int(reach[at]))
        apart = (offsets[others] >= ends[at]) | (ends[others] <= offsets[at])
        if not apart.any(axis=1).all():
            return True
    return False
