"""Which requests bring which reads: merged, cut, and never much more than is wanted."""

from __future__ import annotations

import numpy as np
import pytest

from ckptd.checkpoint.reading import requests as read_requests
from ckptd.checkpoint.reading.requests import GAP_SHARE, Piece, Read, Rows, requests_of

KIB = 1024


def reads(*ranges, file="f"):
    return [Read(file, offset, nbytes, 0, f"item{number}") for number, (offset, nbytes) in enumerate(ranges)]


def asked(wanted):
    return [(request.begin, request.end) for request in requests_of(wanted)]


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(read_requests, "CHUNK_BYTES", 1000)


class TestMerging:
    def test_neighbours_are_one_request(self):
        assert asked(reads((0, 10), (10, 20), (30, 5))) == [(0, 35)]

    def test_a_gap_is_read_along_where_it_is_little_beside_the_whole(self):
        assert asked(reads((0, 100 * KIB), (102 * KIB, 100 * KIB))) == [(0, 202 * KIB)]

    def test_a_gap_that_is_much_beside_the_whole_is_left_out(self):
        assert asked(reads((0, 10), (50, 10))) == [(0, 10), (50, 60)]

    def test_a_large_gap_is_left_out_whatever_the_whole(self):
        far = 64 * KIB + 1
        assert asked(reads((0, 4 << 20), ((4 << 20) + far, 10))) == [
            (0, 4 << 20),
            ((4 << 20) + far, (4 << 20) + far + 10),
        ]

    def test_the_smallest_gaps_go_first(self):
        wanted = reads((0, 3000), (3190, 1000), (4200, 1000), (5280, 1000))
        assert asked(wanted) == [(0, 3000), (3190, 6280)]

    def test_gaps_alike_are_treated_alike(self):
        wanted = reads(*[(number * 1040, 1000) for number in range(100)])
        assert len(asked(wanted)) == 100

    def test_files_stay_apart(self):
        wanted = [*reads((0, 10), (20, 10)), *reads((10, 10), file="g")]
        assert [(request.file, request.begin) for request in requests_of(wanted)] == [("f", 0), ("f", 20), ("g", 10)]

    @pytest.mark.parametrize("seed", range(5))
    def test_what_is_read_along_stays_within_its_share(self, seed):
        random = np.random.default_rng(seed)
        lengths, gaps = random.integers(1, 9000, 200), random.integers(0, 900, 200)
        begins = np.cumsum(lengths + gaps) - lengths
        wanted = reads(*zip(begins.tolist(), lengths.tolist(), strict=True))
        read_bytes = sum(end - begin for begin, end in asked(wanted))
        assert lengths.sum() <= read_bytes <= (1 + GAP_SHARE) * lengths.sum()


class TestCutting:
    def test_requests_end_on_multiples_of_the_chunk(self, small_chunks):
        assert asked(reads((300, 2000))) == [(300, 1000), (1000, 2000), (2000, 2300)]

    def test_pieces_tell_what_a_request_brings_of_each_read(self, small_chunks):
        wanted = reads((0, 1500), (1500, 100))
        first, second = requests_of(wanted)
        assert first.pieces(wanted) == [Piece(0, 0, 1000)]
        assert second.pieces(wanted) == [Piece(0, 1000, 1500), Piece(1, 1500, 1600)]

    def test_reads_that_overlap_are_read_once(self, small_chunks):
        wanted = reads((0, 900), (100, 50), (500, 800))
        first, second = requests_of(wanted)
        assert first.pieces(wanted) == [Piece(0, 0, 900), Piece(1, 100, 150), Piece(2, 500, 1000)]
        assert second.pieces(wanted) == [Piece(2, 1000, 1300)]

    def test_reads_may_come_in_any_order(self):
        wanted = reads((50, 10), (0, 50))
        [request] = requests_of(wanted)
        assert request.pieces(wanted) == [Piece(1, 0, 50), Piece(0, 50, 60)]

    def test_nothing_is_asked_for_nothing(self):
        assert requests_of([]) == []
        assert requests_of(reads((5, 0))) == []


def test_long_rows_are_asked_for_by_the_chunk(small_chunks):
    rows = Rows(np.arange(0, 10_000, 1000), 400)
    wanted = [Read("f", 0, 4000, 0, "item", rows=rows)]
    assert [request.rows for request in requests_of(wanted)] == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10)]


def test_rows_are_asked_for_by_the_batch(monkeypatch):
    monkeypatch.setattr(read_requests, "_ROWS_PER_REQUEST", 2)
    rows = Rows(np.array([0, 100, 200, 300, 400], np.int64), 10)
    wanted = [Read("f", 1000, 50, 0, "item", rows=rows)]
    found = [(request.begin, request.end, request.rows) for request in requests_of(wanted)]
    assert found == [(1000, 1110, (0, 2)), (1200, 1310, (2, 4)), (1400, 1410, (4, 5))]
    assert wanted[0].end == 1410


class TestLargeBlocks:
    """Rows that lie close together bring blocks whole, whichever reads they belong to."""

    MIB = 1 << 20

    def blocks(self, *reads):
        return [request.blocks for request in requests_of(list(reads))]

    def rows(self, offset, *, step=4 * KIB, nbytes=1 << 20, file="f", row_bytes=KIB):
        starts = np.arange(0, nbytes, step, dtype=np.int64)
        return Read(file, offset, len(starts) * row_bytes, 0, "item", rows=Rows(starts, row_bytes))

    def test_a_read_brings_the_blocks_that_it_fills(self):  # in two requests, which share one
        asked = self.blocks(self.rows(self.MIB, nbytes=8 * self.MIB))
        assert asked == [(2 * self.MIB, 6 * self.MIB), (4 * self.MIB, 8 * self.MIB)]

    def test_reads_bring_the_blocks_that_they_fill_together(self):
        assert self.blocks(self.rows(0), self.rows(self.MIB)) == [(0, 2 * self.MIB)] * 2

    @pytest.mark.parametrize("order", [1, -1])
    def test_not_those_that_somebody_else_has_to_fill(self, order):
        far = self.rows(self.MIB, step=12 * KIB)
        whole = Read("f", self.MIB, self.MIB, 0, "item")
        other_file = self.rows(self.MIB, file="g")
        for other in (far, whole, other_file):
            assert all(begin == end for begin, end in self.blocks(*[self.rows(0), other][::order]))

    def test_rows_far_apart_bring_none(self):
        found = self.blocks(self.rows(0, nbytes=4 * self.MIB, step=12 * KIB))
        assert found
        assert all(begin == end for begin, end in found)

    def test_whether_they_are_far_apart_depends_on_where_blocks_begin(self):
        aligned, across = (
            self.blocks(self.rows(at, nbytes=8 * self.MIB, step=8 * KIB, row_bytes=4 * KIB)) for at in (0, 100)
        )
        assert {end - begin for begin, end in aligned} == {0}
        assert across == [(0, 8 * self.MIB)]
