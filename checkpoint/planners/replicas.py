"""What several ranks hold is written by one of them: the lowest, or the one that has the least to write."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from ckptd.protocol.errors import BadPlan

Key = tuple[str, Any]  # name, and offset or None


def dedup_save_plans(all_plans: Sequence[SavePlan], save_to_lowest_rank: bool = False) -> list[SavePlan]:
    """Leave every item to one rank.

    Owners are chosen in the order in which items first appear, each time the rank with the fewest bytes so far; of
    several the lowest. An object counts as one byte: how long it will be is not known yet.

    Args:
        all_plans: The local plans, by rank; they are not changed.
        save_to_lowest_rank: Leave replicas to the lowest rank instead, so that a checkpoint has as few files as can be.

    Returns:
        The plans, each without what another rank writes; the order of items is kept.

    Raises:
        BadPlan: Two ranks hold chunks of different size at the same offset of one tensor.
    """
    holders: dict[Key, list[int]] = {}
    items: dict[Key, WriteItem] = {}
    for rank, plan in enumerate(all_plans):
        for item in plan.items:
            key = key_of(item)
            ranks = holders.setdefault(key, [])
            if not ranks:
                items[key] = item
            elif ranks[-1] != rank and not _alike(items[key], item):
                items[key] = _fuller(items[key], item, ranks, rank)
            ranks.append(rank)
    planned_bytes = [0] * len(all_plans)
    owner: dict[Key, int] = {}
    for key, ranks in holders.items():
        chosen = ranks[0] if save_to_lowest_rank else min(ranks, key=planned_bytes.__getitem__)
        planned_bytes[chosen] += items[key].tensor_storage_size() or 1
        owner[key] = chosen
    return [
        dataclasses.replace(plan, items=[item for item in plan.items if owner[key_of(item)] == rank])
        for rank, plan in enumerate(all_plans)
    ]


def key_of(item: WriteItem) -> Key:
    """Return what makes two items of different ranks the same: name and place."""
    return item.index.fqn, item.index.offset


def _alike(one: WriteItem, other: WriteItem) -> bool:
    if one.tensor_data is None or other.tensor_data is None:
        return one.tensor_data is other.tensor_data
    return one.tensor_data.chunk == other.tensor_data.chunk


def _fuller(kept: WriteItem, item: WriteItem, ranks: list[int], rank: int) -> WriteItem:
    """Return which of two items at one place stands: an empty chunk gives way, and its holders with it."""
    key = item.index.fqn
    if kept.tensor_data is None or item.tensor_data is None:
        raise BadPlan(key, f"rank {ranks[0]} and rank {rank} hold an object and a tensor under the same name")
    if not math.prod(item.tensor_data.chunk.sizes):
        return kept
    if math.prod(kept.tensor_data.chunk.sizes):
        raise BadPlan(key, f"ranks {ranks[0]} and {rank} hold chunks of different size at the same offset")
    ranks.clear()
    return item
