"""Who reads what for whom: the rules of the node's cache, without a segment, a daemon or a clock."""

from __future__ import annotations

import pytest

from ckptd.checkpoint.reading.requests import CHUNK_BYTES
from ckptd.protocol.cache import (
    FRAME_BYTES,
    Begun,
    CacheLimits,
    CacheRules,
    Claim,
    Done,
    Drop,
    Left,
    Lost,
    Opened,
    ReadAlone,
    ReadIt,
    Ready,
    Skipped,
    Tick,
    Wants,
)

FRAME = 100
LIMITS = CacheLimits(frames=2, frame_bytes=FRAME, come_s=1.0, full_s=2.0, read_s=5.0)


class Cache:
    """The rules, a clock, and claims numbered by themselves."""

    def __init__(self, world_size=2, limits=LIMITS):
        self.rules, self.now_s, self.numbers = CacheRules(world_size, limits), 0.0, 0

    def hear(self, event):
        return self.rules.handle(event, self.now_s)

    def after(self, seconds):
        self.now_s += seconds
        return self.hear(Tick())

    def claim(self, rank, begin, end, file="f"):
        self.numbers += 1
        return self.hear(Claim(rank, self.numbers, file, (begin, end)))

    def want(self, *ranks, ranges=((0, 100), (100, 200), (200, 300)), file="f"):
        for rank in ranks:
            for event in (Opened(rank), Wants(rank, file, tuple(ranges)), Begun(rank)):
                assert self.hear(event) == []


@pytest.fixture
def cache():
    cache = Cache()
    cache.want(0, 1)
    return cache


def test_a_loads_requests_fit_into_frames():
    assert FRAME_BYTES % CHUNK_BYTES == 0


class TestSharing:
    def test_the_first_reads_and_the_others_wait_and_copy(self, cache):
        [read] = cache.claim(0, 0, 100)
        assert isinstance(read, ReadIt)
        assert (read.rank, read.range) == (0, (0, 100))
        assert cache.claim(1, 0, 100) == []
        assert cache.hear(Done(0, read.number)) == [Ready(1, 2, read.frame, 100)]

    def test_what_is_there_is_copied_at_once(self, cache):
        [read] = cache.claim(0, 0, 100)
        cache.hear(Done(0, read.number))
        assert cache.claim(1, 0, 100) == [Ready(1, 2, read.frame, 100)]

    def test_a_read_brings_what_overlaps_and_is_wanted_too(self):
        cache = Cache(3)
        cache.want(0, ranges=[(20, 50)])
        cache.want(1, ranges=[(40, 70), (80, 90)])
        cache.want(2, ranges=[(60, 75)])
        [read] = cache.claim(0, 20, 50)
        assert read.range == (20, 75)
        assert cache.claim(2, 60, 75) == []
        assert cache.hear(Done(0, 1)) == [Ready(2, 2, read.frame, 15)]
        [other] = cache.claim(1, 80, 90)
        assert (other.frame, other.range) == (read.frame, (80, 90))

    def test_what_nobody_else_wants_is_read_alone(self):
        cache = Cache()
        cache.want(0, ranges=[(0, 100)])
        cache.want(1, ranges=[(100, 200)])
        assert cache.claim(0, 0, 100) == [ReadAlone(0, 1)]

    def test_the_last_of_all_that_want_it_reads_alone_if_it_is_gone(self, cache):
        cache.hear(Skipped(1, "f", (0, 100)))
        assert cache.claim(0, 0, 100) == [ReadAlone(0, 1)]

    def test_a_request_that_begins_in_a_gap_counts_as_the_announced_one(self, cache):
        cache.hear(Skipped(1, "f", (5, 100)))
        assert cache.claim(0, 0, 100) == [ReadAlone(0, 1)]

    def test_a_rank_that_has_not_begun_may_want_everything(self):
        cache = Cache()
        cache.want(0)
        [read] = cache.claim(0, 0, 100)
        assert isinstance(read, ReadIt)
        cache.hear(Done(0, read.number))
        cache.want(1)
        assert cache.claim(1, 0, 100) == [Ready(1, 2, read.frame, 100)]

    def test_a_rank_that_has_not_said_all_may_want_everything(self):
        cache = Cache()
        cache.want(0)
        cache.hear(Opened(1))
        cache.hear(Wants(1, "g", ((0, 100),)))
        assert isinstance(cache.claim(0, 0, 100)[0], ReadIt)
        cache.hear(Begun(1))
        assert isinstance(cache.claim(0, 100, 200)[0], ReadAlone)

    def test_but_not_for_ever(self):
        cache = Cache()
        cache.want(0)
        cache.after(1.5)
        assert cache.claim(0, 0, 100) == [ReadAlone(0, 1)]

    def test_files_are_not_mixed_up(self, cache):
        cache.want(0, 1, file="g")
        [one] = cache.claim(0, 0, 100, file="f")
        [other] = cache.claim(1, 0, 100, file="g")
        assert isinstance(other, ReadIt)
        assert one.frame != other.frame


class TestFrames:
    def fill(self, cache):
        """Rank 0 has read all that fits."""
        for begin in (0, 100):
            [read] = cache.claim(0, begin, begin + 100)
            cache.hear(Done(0, read.number))

    def test_are_used_again_once_all_have_copied(self, cache):
        self.fill(cache)
        [ready] = cache.claim(1, 0, 100)
        assert cache.claim(0, 200, 300) == []
        [read] = cache.hear(Done(1, ready.number))
        assert (read.frame, read.range) == (ready.frame, (200, 300))

    def test_are_not_used_again_while_somebody_copies(self, cache):
        self.fill(cache)
        for begin in (0, 100):
            cache.claim(1, begin, begin + 100)
        assert cache.claim(0, 200, 300) == []
        assert cache.after(10.0) == [ReadAlone(0, 5)]

    def test_are_taken_from_a_rank_that_is_too_slow(self, cache):
        self.fill(cache)
        assert cache.claim(0, 200, 300) == []
        assert cache.after(1.9) == []
        [read] = cache.after(0.2)
        assert isinstance(read, ReadIt)
        [late] = cache.claim(1, 0, 100)  # reads for itself what it came too late for
        assert isinstance(late, ReadAlone)

    def test_are_not_kept_for_a_slow_rank_a_second_time(self):
        cache = Cache()
        cache.want(0, 1, ranges=[(begin, begin + 100) for begin in range(0, 1000, 100)])
        self.fill(cache)
        cache.claim(0, 200, 300)
        [read] = cache.after(2.1)
        cache.hear(Done(0, read.number))
        [read] = cache.claim(0, 300, 400)
        assert isinstance(read, ReadIt)

    def test_wait_for_ranks_that_may_still_begin(self):
        cache = Cache()
        cache.want(0)
        self.fill(cache)
        assert cache.claim(0, 200, 300) == []
        assert isinstance(cache.after(1.1)[0], ReadAlone)


class TestFailures:
    def test_a_dead_readers_range_goes_to_the_next_who_waits(self, cache):
        [read] = cache.claim(0, 0, 100)
        assert cache.claim(1, 0, 100) == []
        [again] = cache.hear(Lost(0))
        assert (again.rank, again.number) == (1, 2)
        assert again.frame == read.frame

    def test_a_read_that_failed_goes_to_the_next_who_waits(self, cache):
        cache.claim(0, 0, 100)
        assert cache.claim(1, 0, 100) == []
        [again] = cache.hear(Done(0, 1, good=False))
        assert (again.rank, again.number) == (1, 2)

    def test_a_stuck_readers_range_goes_to_the_next_and_its_frame_to_nobody(self):
        cache = Cache(3)
        cache.want(0, 1, 2)
        [stuck] = cache.claim(0, 0, 100)
        assert cache.claim(1, 0, 100) == []
        assert cache.after(4.9) == []
        [again] = cache.after(0.2)
        assert isinstance(again, ReadIt)
        assert (again.rank, again.frame) == (1, stuck.frame)  # the same bytes to the same place: no harm
        assert cache.hear(Done(1, again.number)) == []
        [ready] = cache.claim(2, 0, 100)
        cache.hear(Done(2, ready.number))
        [other] = cache.claim(1, 100, 200)
        assert other.frame != stuck.frame
        cache.hear(Done(1, other.number))
        cache.claim(1, 200, 300)
        for action in cache.after(10.0):
            assert getattr(action, "frame", None) != stuck.frame  # the stuck one may still write there

    def test_a_stuck_readers_frame_is_not_free_when_the_next_one_fails(self):
        cache = Cache(3)
        cache.want(0, 1, 2)
        [stuck] = cache.claim(0, 0, 100)
        cache.claim(1, 0, 100)
        [again] = cache.after(5.1)
        assert cache.hear(Done(1, again.number, good=False)) == []
        for begin in (100, 200):
            for action in cache.claim(1, begin, begin + 100):
                assert action.frame != stuck.frame
        assert [action.frame for action in cache.hear(Done(0, stuck.number))] == [stuck.frame]

    def test_a_lost_ranks_frames_are_never_given_to_others(self, cache):
        """Its process may be stopped in the middle of a write, and come to life again."""
        [read] = cache.claim(0, 0, 100)
        cache.hear(Lost(0))
        for begin in (100, 200):
            for action in cache.claim(1, begin, begin + 100):
                assert getattr(action, "frame", None) != read.frame

    def test_nothing_is_said_to_a_rank_that_is_lost_or_has_left(self, cache):
        cache.claim(0, 0, 100)
        cache.claim(1, 0, 100)
        cache.hear(Left(1))
        assert cache.hear(Done(0, 1)) == []
        cache.hear(Lost(0))
        assert cache.claim(0, 100, 200) in ([], [Drop()])

    def test_late_words_are_no_news(self, cache):
        assert cache.hear(Done(0, 77)) == []
        [read] = cache.claim(0, 0, 100)
        cache.hear(Done(0, read.number))
        assert cache.hear(Done(0, read.number)) == []


class TestTheEnd:
    def test_comes_when_all_ranks_have_left(self, cache):
        assert cache.hear(Left(0)) == []
        assert cache.hear(Left(1)) == [Drop()]

    def test_comes_when_the_rest_is_lost(self, cache):
        cache.hear(Left(0))
        assert cache.hear(Lost(1)) == [Drop()]

    def test_does_not_wait_for_ranks_that_never_begin(self):
        cache = Cache()
        cache.want(0)
        assert cache.hear(Left(0)) == []
        assert cache.after(0.9) == []
        assert cache.after(0.2) == [Drop()]
        assert cache.after(60.0) == []

    def test_does_not_come_while_somebody_loads(self, cache):
        cache.hear(Left(0))
        assert cache.after(3600.0) == []

    def test_is_a_beginning(self, cache):
        [read] = cache.claim(0, 0, 100)
        cache.hear(Done(0, read.number))
        cache.hear(Left(0))
        cache.hear(Left(1))
        cache.want(0, 1)
        [again] = cache.claim(1, 0, 100)
        assert isinstance(again, ReadIt)  # the old segment is gone, and what was in it
