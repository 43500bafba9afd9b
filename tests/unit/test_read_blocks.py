"""Which blocks come whole: those of which next to nothing is left out."""

from __future__ import annotations

import numpy as np
import pytest

from ckptd.checkpoint.reading.blocks import LARGE_BLOCK_BYTES, brings_every_block, whole_blocks

BLOCK = LARGE_BLOCK_BYTES
SLACK = BLOCK // 32


def blocks_of(*ranges):
    begins, ends = (np.array(side, np.int64) for side in zip(*ranges, strict=True))
    return list(zip(*(side.tolist() for side in whole_blocks(begins, ends)), strict=True))


def has_none(found):
    begin, end = found
    return begin == end


class TestWholeBlocks:
    def test_what_a_range_fills_comes_whole(self):
        assert blocks_of((BLOCK, 3 * BLOCK)) == [(BLOCK, 3 * BLOCK)]

    def test_what_it_fills_in_part_does_not(self):
        assert blocks_of((BLOCK // 2, 3 * BLOCK + BLOCK // 2)) == [(BLOCK, 3 * BLOCK)]

    @pytest.mark.parametrize("begin", [0, BLOCK // 3], ids=["from a block's begin", "from within"])
    def test_a_short_range_has_none(self, begin):
        assert has_none(*blocks_of((begin, begin + BLOCK // 2)))

    def test_a_range_over_an_edge_has_none(self):
        assert has_none(*blocks_of((BLOCK // 2, BLOCK + BLOCK // 2)))

    def test_a_little_may_be_left_out(self):
        assert blocks_of((SLACK, 2 * BLOCK)) == [(0, 2 * BLOCK)]
        assert blocks_of((SLACK + 1, 2 * BLOCK)) == [(BLOCK, 2 * BLOCK)]

    def test_neighbours_fill_a_block_together_and_both_may_bring_it(self):
        middle = BLOCK + BLOCK // 2
        assert blocks_of((0, middle), (middle + 100, 3 * BLOCK)) == [(0, 2 * BLOCK), (BLOCK, 3 * BLOCK)]

    def test_neighbours_too_far_apart_do_not(self):
        middle = BLOCK + BLOCK // 2
        assert blocks_of((0, middle), (middle + SLACK + 1, 3 * BLOCK)) == [(0, BLOCK), (2 * BLOCK, 3 * BLOCK)]

    def test_small_ranges_with_small_gaps_add_up(self):
        step, gap = BLOCK // 64, BLOCK // 64 // 40
        close = [(at, at + step - gap) for at in range(0, BLOCK, step)]
        assert blocks_of(*close) == [(0, BLOCK)] * 64
        far = [(at, at + step - 2 * gap) for at in range(0, BLOCK, step)]
        assert all(map(has_none, blocks_of(*far)))

    def test_bytes_wanted_twice_count_once(self):
        half = (0, BLOCK // 2)
        assert all(map(has_none, blocks_of(half, half, (BLOCK // 4, BLOCK // 2))))

    def test_any_order_gives_the_same(self):
        ranges = [(2 * BLOCK, 3 * BLOCK), (0, BLOCK), (BLOCK, 2 * BLOCK)]
        assert blocks_of(*ranges) == ranges

    @pytest.mark.parametrize("seed", range(5))
    def test_never_more_than_a_32nd_is_left_out(self, seed):
        random = np.random.default_rng(seed)
        begins = random.integers(0, 20 * BLOCK, 40)
        ends = begins + random.integers(1, BLOCK, 40)
        covered = np.zeros(22 * BLOCK // 4096, np.bool_)
        for begin, end in zip(begins, ends, strict=True):
            covered[-(-begin // 4096) : end // 4096] = True
        for begin, end in blocks_of(*zip(begins.tolist(), ends.tolist(), strict=True)):
            blocks = covered[begin // 4096 : end // 4096].reshape(-1, BLOCK // 4096)
            # 40 ranges with a page at each end that was not counted.
            assert ((~blocks).sum(axis=1) <= SLACK // 4096 + 80).all()


class TestEveryBlock:
    @pytest.mark.parametrize(
        ("begins", "row_bytes", "every"),
        [
            ([0, 4096, 8192], 1, True),
            ([0, 8191], 4096, True),
            ([0, 8192], 4096, False),
            ([10, 8202], 4096, True),
            ([0, 100, 20_000], 50, False),
            ([0], 10, False),
        ],
        ids=["a row in each", "to a block's end", "every second one", "over the edges", "one far away", "one row"],
    )
    def test_rows_bring_every_block_if_none_lies_between_two(self, begins, row_bytes, every):
        assert brings_every_block(np.array(begins, np.int64), row_bytes) is every
