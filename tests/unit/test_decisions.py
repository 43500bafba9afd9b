"""Decisions at step boundaries: rank 0's, on all ranks, at the same step."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from ckptd.client.manager import decisions as module
from ckptd.client.manager.decisions import Decision, Decisions
from ckptd.client.session.exchange import Patience, Place
from ckptd.protocol.errors import DeadlineExceeded, RankFailed

NO, SAVE, END = Decision(False, False), Decision(True, False), Decision(False, True)


class World:
    def __init__(self, size, patience=None):
        self.store = dist.HashStore()
        self.ranks = [
            Decisions(Place(rank, size, self.store, "test"), patience=patience or Patience()) for rank in range(size)
        ]

    def step(self, *mine):
        """Return what each rank is told to do."""
        with ThreadPoolExecutor(len(mine)) as pool:
            return list(pool.map(lambda pair: pair[0].take(pair[1]), zip(self.ranks, mine, strict=True)))


def test_alone_one_does_as_one_would():
    for mine in (NO, SAVE, END):
        assert Decisions(Place()).take(mine) == mine


def test_rank_0s_clock_counts_and_no_other():
    world = World(3)
    assert world.step(NO, SAVE, SAVE) == [NO] * 3
    assert world.step(SAVE, NO, NO) == [SAVE] * 3


def test_a_signal_to_any_rank_ends_all_at_the_same_step():
    for rank in range(3):
        world = World(3)
        assert world.step(NO, NO, NO) == [NO] * 3
        told = [END if rank == other else NO for other in range(3)]
        first, second = world.step(*told), world.step(*told)
        assert len(set(map(str, first))) == 1
        assert second == [Decision(True, True)] * 3  # a flag may come after rank 0 has passed the step


def test_rank_0_waits_for_nobody():
    leader = World(2).ranks[0]
    assert [leader.take(NO) for _ in range(5)] == [NO] * 5


def test_the_store_does_not_fill_up(monkeypatch):
    monkeypatch.setattr(module, "_KEPT", 8)
    world = World(2)
    for _ in range(30):
        world.step(NO, NO)
    assert world.store.num_keys() <= 9


def test_a_rank_0_that_does_not_come_is_not_waited_for_without_end():
    world = World(2, Patience(step_s=0.02))
    with pytest.raises(DeadlineExceeded, match="rank 0"):
        world.ranks[1].take(NO)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_store_that_is_gone_is_told(rank):
    class Gone:
        def check(self, keys):
            raise RuntimeError("broken pipe")

        set = get = check

    with pytest.raises(RankFailed, match="store is gone"):
        Decisions(Place(rank, 2, Gone(), "test")).take(NO)
