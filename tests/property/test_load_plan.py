"""Boxes and parts of chunks against arrays that are indexed one by one."""

from __future__ import annotations

import math
from unittest.mock import patch

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.client.loading import boxes as load_boxes
from ckptd.client.loading.boxes import overlap_of, part_of

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


@st.composite
def boxes_in_a_chunk(draw):
    stored = draw(st.lists(st.integers(1, 6), max_size=4).map(tuple))
    begins = tuple(draw(st.integers(0, size - 1)) for size in stored)
    sizes = tuple(draw(st.integers(1, size - begin)) for size, begin in zip(stored, begins, strict=True))
    return stored, begins, sizes


@often
@given(boxes_in_a_chunk(), st.sampled_from([1, 2, 4]), st.sampled_from([0, 8, 512]))
def test_a_part_is_the_box_once_its_bytes_are_packed(box, itemsize, sector_bytes):
    stored, begins, sizes = box
    with patch.object(load_boxes, "_SECTOR_BYTES", sector_bytes):
        part = part_of(stored, begins, sizes, itemsize=itemsize)
    elements = np.arange(math.prod(stored)).reshape(stored)
    wanted = elements[tuple(slice(b, b + n) for b, n in zip(begins, sizes, strict=True))]
    starts, length = ([0], part.nbytes) if part.rows is None else (part.rows.starts.tolist(), part.rows.row_bytes)
    read = [at for start in starts for at in range(part.begin + start, part.begin + start + length)]
    assert len(read) == part.nbytes
    assert sorted(set(read)) == read
    packed = np.array(read[::itemsize]).reshape(part.sizes) // itemsize
    inside = packed[tuple(slice(c, c + n) for c, n in zip(part.corner, sizes, strict=True))]
    assert np.array_equal(inside, wanted)
    if sector_bytes == 0:
        assert part.nbytes <= (1 + load_boxes.GAP_SHARE) * wanted.size * itemsize
