"""Which bytes of a stored chunk are read for a box of it."""

from __future__ import annotations

import pytest
import torch

from ckptd.client.loading.boxes import Overlap, overlap_of, part_of, row_major


class TestOverlap:
    @pytest.mark.parametrize(
        ("stored", "wanted", "shared"),
        [
            (((0,), (4,)), ((0,), (4,)), Overlap((0,), (0,), (4,))),
            (((2,), (4,)), ((0,), (3,)), Overlap((0,), (2,), (1,))),
            (((0, 0), (4, 4)), ((1, 2), (9, 9)), Overlap((1, 2), (0, 0), (3, 2))),
            (((0,), (4,)), ((4,), (4,)), None),
            (((0,), (0,)), ((0,), (4,)), None),
            (((), ()), ((), ()), Overlap((), (), ())),
        ],
    )
    def test_two_boxes(self, stored, wanted, shared):
        assert overlap_of(stored, wanted) == shared


class TestAPart:
    def test_whole_rows_are_one_range(self):
        part = part_of((4, 6), (1, 0), (2, 6), itemsize=4)
        assert (part.begin, part.nbytes, part.rows) == (24, 48, None)

    def test_a_part_of_one_row_is_one_range(self):
        part = part_of((4, 6), (3, 1), (1, 5), itemsize=1)
        assert (part.begin, part.nbytes, part.rows) == (19, 5, None)

    def test_a_scalar_is_its_own_part(self):
        part = part_of((), (), (), itemsize=8)
        assert (part.begin, part.nbytes, part.rows) == (0, 8, None)

    def test_columns_far_apart_are_read_row_by_row(self):
        part = part_of((4, 1000), (0, 200), (4, 300), itemsize=4)
        assert part.rows is not None
        assert (part.begin, part.nbytes, part.rows.row_bytes) == (800, 4800, 1200)
        assert part.rows.starts.tolist() == [0, 4000, 8000, 12000]
        assert part.rows.span_bytes == 13200
        assert (part.sizes, part.corner) == ((4, 300), (0, 0))

    def test_gaps_within_a_sector_are_read_along(self):
        part = part_of((4, 100), (1, 10), (2, 40), itemsize=4)
        assert (part.begin, part.nbytes, part.rows) == (400, 800, None)
        assert (part.sizes, part.corner) == ((2, 100), (0, 10))

    def test_gaps_that_are_small_beside_a_row_are_read_along(self):
        assert part_of((4, 100_000), (0, 0), (4, 99_000), itemsize=4).rows is None
        assert part_of((4, 100_000), (0, 0), (4, 90_000), itemsize=4).rows is not None

    def test_rows_of_rows(self):
        part = part_of((3, 4, 1000), (1, 1, 0), (2, 2, 1000), itemsize=1)
        assert part.rows is not None
        assert (part.begin, part.rows.row_bytes, part.rows.starts.tolist()) == (5000, 2000, [0, 4000])

    def test_rows_of_rows_of_rows(self):
        part = part_of((3, 4, 9, 1000), (0, 1, 3, 0), (3, 2, 2, 488), itemsize=1)
        assert part.rows is not None
        assert part.rows.starts.tolist() == [
            a * 36000 + b * 9000 + c * 1000 for a in range(3) for b in range(2) for c in range(2)
        ]

    def test_what_is_read_along_inside_may_join_rows_outside(self):
        part = part_of((3, 4, 100), (0, 0, 0), (3, 4, 99), itemsize=1)
        assert (part.rows, part.sizes) == (None, (3, 4, 100))

    @pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
    def test_strides_are_those_of_torch(self, shape):
        assert row_major(shape) == torch.empty(shape).stride()
