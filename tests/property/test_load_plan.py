"""Boxes and spans against arrays that are indexed one by one."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.client.load_plan import byte_span, overlap_of, row_major

often = settings(max_examples=150, deadline=None)


@st.composite
def two_boxes(draw):
    ndim = draw(st.integers(0, 3))
    box = st.tuples(st.tuples(*[st.integers(0, 5)] * ndim), st.tuples(*[st.integers(0, 4)] * ndim))
    return draw(box), draw(box)


def held(box) -> np.ndarray:
    offsets, sizes = box
    grid = np.zeros((10,) * len(offsets), bool)
    grid[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))] = True
    return grid


@often
@given(two_boxes())
def test_an_overlap_is_what_both_boxes_hold(boxes):
    stored, wanted = boxes
    both = held(stored) & held(wanted)
    found = overlap_of(stored, wanted)
    if found is None:
        assert not both.any()
        return
    for inside, (offsets, _) in ((found.in_stored, stored), (found.in_wanted, wanted)):
        corner = tuple(at + begin for at, begin in zip(offsets, inside, strict=True))
        assert np.array_equal(held((corner, found.sizes)), both)


@often
@given(two_boxes(), st.sampled_from([1, 2, 4, 16]))
def test_a_span_is_the_least_range_that_holds_the_box(boxes, itemsize):
    stored, wanted = boxes
    overlap = overlap_of(stored, wanted)
    if overlap is None:
        return
    sizes = stored[1]
    at = np.arange(math.prod(sizes)).reshape(sizes)
    box = at[tuple(slice(b, b + n) for b, n in zip(overlap.in_stored, overlap.sizes, strict=True))].ravel()
    first, nbytes, exact = byte_span(sizes, overlap, itemsize)
    assert first == box.min() * itemsize
    assert nbytes == (box.max() - box.min() + 1) * itemsize
    assert exact == (len(box) == box.max() - box.min() + 1)
    steps = np.indices(overlap.sizes).reshape(len(sizes), len(box))
    assert np.array_equal(np.sort(np.array(row_major(sizes), int) @ steps + box.min()), np.sort(box))
