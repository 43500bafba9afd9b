"""The global plan of a job: who writes what, and the index of the checkpoint that comes of it. Knows no torch.

Replicated items are written once, balanced over ranks by bytes. Gaps, overlaps and contradictions are refused, because
a checkpoint that cannot be loaded must not be committed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckptd.checkpoint.image.layout import Layout, make_layout
from ckptd.checkpoint.indexing.index import Index
from ckptd.checkpoint.names import image_name
from ckptd.checkpoint.planning.items import LOWEST_RANK, Int64, LocalPlan
from ckptd.checkpoint.planning.tiling import check_tiling
from ckptd.protocol.errors import BadPlan
from ckptd.staging.dtypes import DTYPES, OBJECT

Bool = NDArray[np.bool_]


@dataclass(frozen=True)
class JobPlan:
    """A plan over all ranks.

    Attributes:
        assigned: Per rank, positions of the items that it writes, in image order.
        layouts: Per rank, where they lie in its image.
        index_rows: Per rank, the row of the index that each of them fills; -1 for a copy that another rank's replaces.
        is_object: Per rank, which of its written items are objects.
        index: The checkpoint's index, all but the hashes and the objects' true lengths.
    """

    assigned: list[Int64]
    layouts: list[Layout]
    index_rows: list[Int64]
    is_object: list[Bool]
    index: Index


@dataclass(frozen=True)
class _Names:
    """The names of all ranks, merged."""

    names: list[str]
    paths: list[tuple[str | int, ...]]
    dtype: NDArray[np.uint8]
    ndim: NDArray[np.uint8]
    shape: Int64
    requires_grad: NDArray[np.uint8]
    of_rank: list[Int64]  # per rank: its name positions -> merged positions


@dataclass(frozen=True)
class _Items:
    """The items of all ranks, one behind the other."""

    rank: Int64
    local: Int64
    name: Int64
    offsets: Int64
    sizes: Int64
    nbytes: Int64
    staged: Bool  # by a rank that had already staged when the plan was made
    lost: Bool  # held by such a rank, but not staged


def make_plan(plans: list[LocalPlan], fixed: list[Int64 | None] | None = None) -> JobPlan:
    """Plan over all ranks.

    Args:
        plans: What each rank holds, by rank.
        fixed: Per rank, the positions that it has already staged under an earlier plan; None if it has staged nothing.

    Raises:
        BadPlan: The items leave a gap, overlap, or contradict each other; the key is named.
    """
    fixed = fixed or [None] * len(plans)
    names = _merge_names(plans)
    items = _gather(plans, fixed, names)
    lowest = any(LOWEST_RANK in plan.settings for plan in plans)
    winners = _choose(items, names, len(plans), lowest=lowest)
    chunks = (items.name[winners], items.offsets[winners], items.sizes[winners])
    check_tiling(names.names, names.shape, names.ndim, chunks)
    assigned: list[Int64] = []
    for rank, staged in enumerate(fixed):
        chosen = np.sort(items.local[winners[items.rank[winners] == rank]])
        assigned.append(chosen if staged is None else staged)
    layouts = [make_layout(plan, mine) for plan, mine in zip(plans, assigned, strict=True)]
    rows, index = _index(names, items, winners, (assigned, layouts))
    is_object = [plan.dtype[plan.item_name[mine]] == OBJECT for plan, mine in zip(plans, assigned, strict=True)]
    return JobPlan(assigned, layouts, rows, is_object, index)


def _merge_names(plans: list[LocalPlan]) -> _Names:
    dimensions = max(plan.shape.shape[1] for plan in plans)
    position: dict[str, int] = {}
    paths: list[tuple[str | int, ...]] = []
    of_rank: list[Int64] = []
    dtype, ndim, shape, grad = [], [], [], []
    for rank, plan in enumerate(plans):
        if rank and plan.names == plans[0].names:
            mine = of_rank[0]
        else:
            mine = np.array([position.setdefault(name, len(position)) for name in plan.names], dtype=np.int64)
        of_rank.append(mine)
        fresh = np.flatnonzero(mine >= len(paths)) if len(position) > len(paths) else np.zeros(0, np.int64)
        paths.extend(plan.paths[i] for i in fresh.tolist())
        wide = np.zeros((len(plan.names), dimensions), np.int64)
        wide[:, : plan.shape.shape[1]] = plan.shape
        dtype.append(plan.dtype[fresh])
        ndim.append(plan.ndim[fresh])
        grad.append(plan.requires_grad[fresh])
        shape.append(wide[fresh])
        _same_everywhere(rank, plan, wide, mine, (np.concatenate(dtype), np.concatenate(ndim), np.concatenate(shape)))
    return _Names(
        list(position),
        paths,
        np.concatenate(dtype),
        np.concatenate(ndim),
        np.concatenate(shape),
        np.concatenate(grad),
        of_rank,
    )


def _same_everywhere(
    rank: int,
    plan: LocalPlan,
    shape: Int64,
    mine: Int64,
    merged: tuple[NDArray[np.uint8], NDArray[np.uint8], Int64],
) -> None:
    dtype, ndim, shapes = merged
    differs = (dtype[mine] != plan.dtype) | (ndim[mine] != plan.ndim) | (shapes[mine] != shape).any(axis=1)
    if differs.any():
        at = int(np.flatnonzero(differs)[0])
        there = int(mine[at])
        ours = _describe(int(plan.dtype[at]), shape[at, : plan.ndim[at]])
        theirs = _describe(int(dtype[there]), shapes[there, : ndim[there]])
        raise BadPlan(plan.names[at], f"rank {rank} holds {ours}, a lower rank holds {theirs} under the same name")


def _describe(dtype: int, shape: Int64) -> str:
    return "an object" if dtype == OBJECT else f"{DTYPES[dtype].name}{shape.tolist()}"


def _gather(plans: list[LocalPlan], fixed: list[Int64 | None], names: _Names) -> _Items:
    dimensions = names.shape.shape[1]
    rank, local, name, offsets, sizes, nbytes, staged, lost = [], [], [], [], [], [], [], []
    itemsize = np.array([d.itemsize_bytes for d in DTYPES] + [0] * (256 - len(DTYPES)), dtype=np.int64)
    for number, (plan, done) in enumerate(zip(plans, fixed, strict=True)):
        count = plan.items
        wide = np.zeros((2, count, dimensions), np.int64)
        wide[0, :, : plan.item_offsets.shape[1]] = plan.item_offsets
        wide[1, :, : plan.item_sizes.shape[1]] = plan.item_sizes
        used = np.arange(dimensions)[None, :] < plan.ndim[plan.item_name][:, None]
        volume = np.where(used, wide[1], 1).prod(axis=1)
        held = np.zeros(count, np.bool_)
        if done is not None:
            held[done] = True
        rank.append(np.full(count, number, np.int64))
        local.append(np.arange(count, dtype=np.int64))
        name.append(names.of_rank[number][plan.item_name])
        offsets.append(wide[0])
        sizes.append(wide[1])
        nbytes.append(volume * itemsize[plan.dtype[plan.item_name]] + plan.capacity)
        staged.append(held)
        lost.append(~held if done is not None else np.zeros(count, np.bool_))
    return _Items(*(np.concatenate(c) for c in (rank, local, name, offsets, sizes, nbytes, staged, lost)))


def _choose(items: _Items, names: _Names, world_size: int, *, lowest: bool) -> Int64:
    """Return the positions of the items that make up the checkpoint: one of each group of replicas."""
    key = np.concatenate([items.name[:, None], items.offsets], axis=1)
    _, group = np.unique(key, axis=0, return_inverse=True)
    group = group.reshape(-1)
    order = np.argsort(group, kind="stable")
    begins = np.flatnonzero(np.diff(group[order], prepend=-1))
    counts = np.diff(begins, append=len(order))
    _check_replicas(items, names, order, np.repeat(order[begins], counts))
    single = order[begins[counts == 1]]
    _check_staged(items, names, single)
    load = np.bincount(items.rank[single], weights=items.nbytes[single], minlength=world_size).tolist()
    winners = [single]
    several = np.flatnonzero(counts > 1)
    heaviest_first = several[np.argsort(-items.nbytes[order[begins[several]]], kind="stable")]
    rank, nbytes = items.rank.tolist(), items.nbytes.tolist()
    picked: list[int] = []
    for at in heaviest_first.tolist():
        members = order[begins[at] : begins[at] + counts[at]]
        ready = members[items.staged[members]]
        candidates = ready if len(ready) else members[~items.lost[members]]
        _check_staged(items, names, members[:1] if not len(candidates) else candidates[:1])
        best = min(candidates.tolist(), key=lambda item: (0 if lowest else load[rank[item]], rank[item]))
        load[rank[best]] += nbytes[best]
        picked.append(best)
    winners.append(np.array(picked, dtype=np.int64))
    return np.sort(np.concatenate(winners))


def _check_replicas(items: _Items, names: _Names, members: Int64, first: Int64) -> None:
    differs = (items.sizes[members] != items.sizes[first]).any(axis=1)
    if differs.any():
        at = int(np.flatnonzero(differs)[0])
        one, other = int(first[at]), int(members[at])
        raise BadPlan(
            names.names[items.name[one]],
            f"ranks {items.rank[one]} and {items.rank[other]} hold chunks of different size at the same offset",
        )


def _check_staged(items: _Items, names: _Names, chosen: Int64) -> None:
    lost = chosen[items.lost[chosen]]
    if len(lost):
        reason = "it was left to a rank that no longer holds it, and nobody staged it; save again"
        raise BadPlan(names.names[items.name[lost[0]]], reason)


def _index(
    names: _Names, items: _Items, winners: Int64, written: tuple[list[Int64], list[Layout]]
) -> tuple[list[Int64], Index]:
    assigned, layouts = written
    row_of = np.full(len(items.rank), -1, np.int64)
    row_of[winners] = np.arange(len(winners))
    first = np.searchsorted(items.rank, np.arange(len(assigned)))
    columns = np.zeros((4, len(winners)), np.int64)
    rows_of_rank: list[Int64] = []
    for rank, layout in enumerate(layouts):
        rows = row_of[first[rank] + assigned[rank]] if len(assigned[rank]) else np.zeros(0, np.int64)
        kept = rows >= 0
        for column, values in enumerate(
            (layout.record_offset, layout.record_bytes, layout.data_offset, layout.data_bytes)
        ):
            columns[column, rows[kept]] = values[kept]
        rows_of_rank.append(rows)
    index = Index(
        header={},
        names=names.names,
        paths=names.paths,
        dtype=names.dtype,
        ndim=names.ndim,
        shape=names.shape,
        requires_grad=names.requires_grad,
        item_name=items.name[winners],
        item_offsets=items.offsets[winners],
        item_sizes=items.sizes[winners],
        files=[image_name(rank) for rank in range(len(assigned))],
        item_file=items.rank[winners].astype(np.int32),
        record_offset=columns[0],
        record_bytes=columns[1],
        data_offset=columns[2],
        data_bytes=columns[3],
        item_hash=np.zeros(len(winners), np.uint64),
    )
    return rows_of_rank, index
