"""Tilings against a count of every element, and balance against its bound."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.plans import Held, index_places, local_plan

from ckptd.checkpoint.planning.plan import make_plan
from ckptd.checkpoint.planning.tiling import check_tiling, overlaps
from ckptd.protocol.errors import BadPlan

often = settings(max_examples=60, deadline=None)


@st.composite
def tiled(draw, shape: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut a box in two, again and again."""
    boxes = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(boxes) - 1))
        offsets, sizes = boxes[at]
        along = [d for d, size in enumerate(sizes) if size > 1]
        if not along:
            continue
        d = draw(st.sampled_from(along))
        cut = draw(st.integers(1, sizes[d] - 1))
        low = (offsets, (*sizes[:d], cut, *sizes[d + 1 :]))
        moved = (*offsets[:d], offsets[d] + cut, *offsets[d + 1 :])
        boxes[at : at + 1] = [low, (moved, (*sizes[:d], sizes[d] - cut, *sizes[d + 1 :]))]
    return boxes


shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@st.composite
def nearly_tiled(draw):
    """Boxes that tile their tensor, or miss it by a little."""
    shape = draw(shapes)
    boxes = draw(tiled(shape))
    if shape and draw(st.booleans()):
        at = draw(st.integers(0, len(boxes) - 1))
        change = draw(st.sampled_from(["drop", "twice", "nudge", "resize"]))
        offsets, sizes = boxes.pop(at)
        d = draw(st.integers(0, len(shape) - 1))
        by = draw(st.sampled_from([-1, 1]))
        if change == "twice":
            boxes += [(offsets, sizes)] * 2
        elif change == "nudge":
            boxes.append(((*offsets[:d], max(0, offsets[d] + by), *offsets[d + 1 :]), sizes))
        elif change == "resize":
            boxes.append((offsets, (*sizes[:d], max(0, sizes[d] + by), *sizes[d + 1 :])))
    return shape, boxes


def counted(shape, boxes):
    """Return how often each element is held, on a grid that is larger than the tensor."""
    grid = np.zeros(tuple(size + 8 for size in shape), int)
    for offsets, sizes in boxes:
        grid[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))] += 1
    return grid


@settings(often, max_examples=120)
@given(nearly_tiled(), nearly_tiled())
def test_tilings_are_told_from_others(one, other):
    tensors = [one, other]
    wide = max(len(shape) for shape, _ in tensors)

    def padded(box):
        return (*box, *[0] * (wide - len(box)))

    good, boxes = True, []
    for name, (shape, mine) in enumerate(tensors):
        inside = tuple(slice(0, size) for size in shape)
        grid = counted(shape, mine)
        held = [all(at + size <= end for at, size, end in zip(*box, shape, strict=True)) for box in mine]
        good &= bool((grid[inside] == 1).all()) and grid.sum() == grid[inside].sum() and all(held) and bool(mine)
        boxes += [(name, padded(offsets), padded(sizes)) for offsets, sizes in mine]
    columns = (
        np.array([box[0] for box in boxes], np.int64),
        np.array([box[1] for box in boxes], np.int64).reshape(len(boxes), wide),
        np.array([box[2] for box in boxes], np.int64).reshape(len(boxes), wide),
    )
    shape = np.array([padded(shape) for shape, _ in tensors], np.int64).reshape(2, wide)
    ndim = np.array([len(shape) for shape, _ in tensors], np.uint8)
    if good:
        check_tiling(["one", "other"], shape, ndim, columns)
    else:
        with pytest.raises(BadPlan):
            check_tiling(["one", "other"], shape, ndim, columns)


box = st.tuples(st.tuples(*[st.integers(0, 6)] * 2), st.tuples(*[st.integers(0, 3)] * 2))


@settings(often, max_examples=100)
@given(st.lists(box, max_size=6))
def test_boxes_overlap_if_and_only_if_they_share_an_element(boxes):
    offsets = np.array([offsets for offsets, _ in boxes], np.int64).reshape(len(boxes), 2)
    sizes = np.array([sizes for _, sizes in boxes], np.int64).reshape(len(boxes), 2)
    assert overlaps(offsets, sizes) == bool((counted((9, 9), boxes) > 1).any())


@often
@given(st.data())
def test_any_spread_of_tilings_and_replicas_is_written_once_and_balanced(data):
    world = data.draw(st.integers(1, 4))
    ranks: list[dict[str, Held]] = [{} for _ in range(world)]
    wanted, replicated_bytes = set(), [0]
    for number in range(data.draw(st.integers(0, 4))):
        shape = data.draw(st.lists(st.integers(1, 5), max_size=3).map(tuple))
        boxes = data.draw(tiled(shape))
        held: dict[int, list[object]] = {}
        for offsets, sizes in boxes:
            holders = data.draw(st.sets(st.integers(0, world - 1), min_size=1))
            wanted.add((f"w{number}", offsets, sizes))
            if len(holders) > 1:
                replicated_bytes.append(4 * int(np.prod(sizes)))
            for rank in holders:
                held.setdefault(rank, []).append((offsets, sizes))
        for rank, mine in held.items():
            ranks[rank][f"w{number}"] = Held(shape, tuple(mine))
    plan = make_plan([local_plan(held) for held in ranks])
    places = index_places(plan)
    assert {place[:3] for place in places} == wanted
    assert len(places) == len(wanted) == sum(len(mine) for mine in plan.assigned)
    if all(ranks[0] == held for held in ranks):
        loads = [int(layout.data_bytes.sum()) for layout in plan.layouts]
        assert max(loads) - min(loads) <= max(replicated_bytes) or world == 1
