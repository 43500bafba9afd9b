"""Who takes part in a job."""

from __future__ import annotations

import pytest

from ckptd.protocol.errors import RankMismatch, RankTaken
from ckptd.protocol.session import Roster


def joined(*ranks: int, world_size: int = 3, launch: str = "") -> Roster:
    roster = Roster("job")
    for rank in ranks:
        assert roster.join(rank, world_size=world_size, launch=launch, pid=100 + rank) == []
    return roster


def test_the_first_rank_begins_the_first_incarnation():
    roster = joined(2)
    assert (roster.incarnation, roster.world_size, roster.live_ranks()) == (1, 3, [2])


def test_ranks_come_in_any_order():
    roster = joined(2, 0, 1)
    assert (roster.incarnation, roster.live_ranks()) == (1, [0, 1, 2])


def test_a_rank_is_taken_once():
    roster = joined(0, 1)
    with pytest.raises(RankTaken) as caught:
        roster.join(1, world_size=3, launch="", pid=999)
    assert caught.value.report().facts == {"job": "job", "rank": 1, "pid": 101}
    assert roster.seats[1].pid == 101


@pytest.mark.parametrize("rank", [3, 4])
def test_a_rank_outside_the_world_is_refused(rank):
    roster = joined(0)
    with pytest.raises(RankMismatch, match=f"rank {rank} of 3"):
        roster.join(rank, world_size=3, launch="", pid=1)
    assert roster.live_ranks() == [0]


def test_another_world_size_is_refused_while_ranks_are_live():
    roster = joined(0)
    with pytest.raises(RankMismatch, match="world size 4, but the others have world size 3"):
        roster.join(1, world_size=4, launch="", pid=1)


def test_a_rank_that_comes_back_begins_an_incarnation_and_fences_the_others():
    roster = joined(0, 1, 2)
    roster.leave(1, incarnation=1)
    assert roster.live_ranks() == [0, 2]
    assert roster.join(1, world_size=3, launch="", pid=7) == [0, 2]
    assert (roster.incarnation, roster.live_ranks()) == (2, [1])


def test_another_launch_fences_all_ranks_even_the_same_one():
    roster = joined(0, 1, launch="first")
    assert roster.join(1, world_size=2, launch="second", pid=7) == [0, 1]
    assert (roster.incarnation, roster.world_size, roster.launch) == (2, 2, "second")
    assert roster.join(0, world_size=2, launch="second", pid=8) == []


@pytest.mark.parametrize(("ours", "theirs"), [("", "second"), ("first", "")])
def test_a_launch_that_is_not_told_is_no_other_launch(ours, theirs):
    roster = joined(0, launch=ours)
    assert roster.join(1, world_size=3, launch=theirs, pid=7) == []
    assert roster.incarnation == 1


def test_when_nobody_is_left_the_next_one_begins_anew_with_any_world():
    roster = joined(0, 1)
    for rank in (0, 1):
        roster.leave(rank, incarnation=1)
    assert roster.join(0, world_size=8, launch="", pid=7) == []
    assert (roster.incarnation, roster.world_size) == (2, 8)


def test_news_from_an_older_incarnation_are_dropped():
    roster = joined(0, 1)
    roster.leave(0, incarnation=1)
    roster.join(0, world_size=3, launch="", pid=7)
    roster.leave(0, incarnation=1)
    assert roster.live_ranks() == [0]
    roster.leave(5, incarnation=2)
    assert roster.live_ranks() == [0]
