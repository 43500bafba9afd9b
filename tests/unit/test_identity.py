"""Who this process is in its job; the ranks compare notes through a key-value store and nothing else."""

from __future__ import annotations

import os
import sys

import pytest
from support.stores import FakeDist, FakeStore

from ckptd.client.session import identity as identity_module
from ckptd.client.session.identity import Identity, alone, check_local_world, check_same_daemon, of_group
from ckptd.protocol.errors import DeadlineExceeded, MultiNode


class World:
    """Some ranks, each of which may open sessions."""

    def __init__(self, monkeypatch, size: int) -> None:
        self.store, self.size = FakeStore(), size
        self._monkeypatch = monkeypatch
        self._opened: dict[int, dict[str, int]] = {rank: {} for rank in range(size)}

    def identity(self, me: int, *, ranks: list[int] | None = None, job: str | None = None) -> Identity:
        """Return what a process finds out; processes share nothing but the store."""
        ranks = list(range(self.size)) if ranks is None else ranks
        self._monkeypatch.setattr(identity_module, "dist", FakeDist(ranks, me))
        self._monkeypatch.setattr(identity_module, "_get_default_store", lambda: self.store)
        self._monkeypatch.setattr(identity_module, "_opened", self._opened[me])
        return of_group(None, job=job, timeout_s=5.0)


@pytest.fixture
def world(monkeypatch):
    return World(monkeypatch, 3)


class TestAlone:
    def test_a_job_of_one_has_a_name_of_its_own(self, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["/some/where/train.py"])
        one, other = alone(), alone()
        assert one.job.startswith(f"train.py-{os.getpid()}-")
        assert one.job != other.job
        assert (one.rank, one.world_size, one.store) == (0, 1, None)

    def test_or_the_one_that_it_is_given(self):
        assert alone("mine").job == "mine"

    @pytest.mark.parametrize("argv", [[""], ["dir/"]])
    def test_a_program_without_a_name_is_python(self, monkeypatch, argv):
        monkeypatch.setattr(sys, "argv", argv)
        assert alone().job.startswith("python-")

    def test_a_group_of_one_is_alone(self, monkeypatch):
        world = World(monkeypatch, 1)
        assert world.identity(0).store is None
        assert world.store.content == {}


class TestAGroup:
    def test_rank_0_names_the_job_and_the_launch_for_all(self, world):
        identities = [world.identity(rank) for rank in range(3)]
        assert [identity.rank for identity in identities] == [0, 1, 2]
        assert {identity.world_size for identity in identities} == {3}
        assert len({(identity.job, identity.launch, identity.prefix) for identity in identities}) == 1
        assert len(identities[0].launch) == 16

    def test_a_name_that_is_given_is_taken(self, world):
        assert [world.identity(rank, job="mine").job for rank in range(3)] == ["mine"] * 3

    def test_every_start_is_another_launch(self, monkeypatch):
        one, other = (World(monkeypatch, 2).identity(0, job="mine") for _ in range(2))
        assert one.job == other.job
        assert one.launch != other.launch

    def test_a_second_session_of_the_group_has_keys_of_its_own(self, world):
        first = [world.identity(rank) for rank in range(3)]
        second = [world.identity(rank) for rank in range(3)]
        assert {i.prefix for i in first}.isdisjoint(i.prefix for i in second)
        assert second[0].launch == second[2].launch != first[0].launch

    def test_another_group_of_ranks_has_keys_of_its_own(self, world):
        whole = [world.identity(rank) for rank in range(3)]
        part = [world.identity(rank, ranks=[0, 2]) for rank in (0, 2)]
        assert part[0].prefix == part[1].prefix != whole[0].prefix
        assert [identity.rank for identity in part] == [0, 1]

    def test_waiting_for_rank_0_has_a_deadline(self, world):
        with pytest.raises(DeadlineExceeded, match=r"waits for the other ranks: nothing happened for 5.0 s"):
            world.identity(1)
        assert [wait.total_seconds() for wait in world.store.waits] == [5.0]


class TestTheSameDaemon:
    def test_ranks_that_reached_the_same_go_on(self, world):
        identities = [world.identity(rank) for rank in range(3)]
        for identity in identities[1:]:
            world.store.set(f"{identity.prefix}/daemon/{identity.rank}", "daemon-a")
        check_same_daemon(identities[0], "daemon-a", timeout_s=1.0)

    def test_ranks_that_reached_another_are_counted(self, world):
        identities = [world.identity(rank) for rank in range(3)]
        for identity, daemon in zip(identities[1:], ["daemon-a", "daemon-b"], strict=True):
            world.store.set(f"{identity.prefix}/daemon/{identity.rank}", daemon)
        with pytest.raises(MultiNode) as caught:
            check_same_daemon(identities[0], "daemon-a", timeout_s=1.0)
        assert (caught.value.world_size, caught.value.local_ranks) == (3, 2)

    def test_ranks_that_reached_none_are_not_waited_for_for_ever(self, world):
        with pytest.raises(DeadlineExceeded):
            check_same_daemon(world.identity(0), "daemon-a", timeout_s=1.0)

    def test_who_has_no_store_compares_nothing(self):
        check_same_daemon(Identity("job", 1, 4), "daemon-a", timeout_s=1.0)


class TestTheLocalWorld:
    @pytest.mark.parametrize(
        ("local", "world", "size"), [("4", "4", 4), ("", "", 4), ("x", "8", 8), ("2", "8", 4), ("8", "", 8)]
    )
    def test_one_node_is_fine(self, monkeypatch, local, world, size):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        monkeypatch.setenv("WORLD_SIZE", world)
        check_local_world(Identity("job", 0, size))

    def test_several_nodes_are_refused_with_the_numbers(self, monkeypatch):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
        monkeypatch.setenv("WORLD_SIZE", "16")
        with pytest.raises(MultiNode, match="the job has 16 ranks, 8 of them on this node"):
            check_local_world(Identity("job", 0, 16))
