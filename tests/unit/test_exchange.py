"""Steps that ranks take together through a store: answered alike, failed alike, never waited for without end."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist
from support.stores import FakeDist

from ckptd.client.session import exchange as exchange_module
from ckptd.client.session.exchange import Exchange, Patience, Place, _Line, place_in
from ckptd.protocol.errors import DiskFull, RankFailed, Unsupported, UserCodeFailed

QUICK = Patience(step_s=20.0, silence_s=20.0, beat_s=0.01)
HASTY = Patience(step_s=0.05, silence_s=20.0, beat_s=0.01)


class World:
    """Some ranks, as threads, with a store of torch's own."""

    def __init__(self, size: int, patience: Patience = QUICK) -> None:
        self.store, self.size, self._patience = dist.HashStore(), size, patience

    def exchange(self, rank: int) -> Exchange:
        return Exchange(Place(rank, self.size, self.store, "ckptd/test"), patience=self._patience)

    def run(self, what, ranks=None):
        """Run ``what(exchange)`` on the ranks and return what each returned or raised."""

        def one(rank):
            try:
                with self.exchange(rank) as exchange:
                    return what(exchange)
            except BaseException as error:  # noqa: BLE001  # the test looks at it
                return error

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(one, range(self.size) if ranks is None else ranks))


def number(exchange: Exchange) -> bytes:
    return str(exchange.rank).encode()


def say(outcome: object) -> str:
    return f"{type(outcome).__name__}: {outcome}"


class Watched:
    """A store that notes how large values get."""

    def __init__(self, store):
        self._store, self.largest_bytes = store, 0

    def __getattr__(self, name):
        return getattr(self._store, name)

    def set(self, key, value):
        self.largest_bytes = max(self.largest_bytes, len(value))
        self._store.set(key, value)


class TestAStep:
    def test_the_coordinator_sees_all_parts_in_order_and_answers_each_rank(self):
        def step(exchange):
            return exchange.together("x", lambda: number(exchange), lambda parts: [b">" + p for p in reversed(parts)])

        assert World(3).run(step) == [b">2", b">1", b">0"]

    def test_steps_follow_each_other_and_leave_nothing_in_the_store(self):
        def steps(exchange):
            first = exchange.together("one", lambda: number(exchange), lambda parts: [b"".join(parts)] * 3)
            return first + exchange.together("two", lambda: number(exchange), lambda parts: parts)

        world = World(3)
        assert world.run(steps) == [b"0120", b"0121", b"0122"]
        assert world.store.num_keys() == 0

    def test_without_an_answer_ranks_only_agree(self):
        assert World(2).run(lambda exchange: exchange.together("x", lambda: b"part")) == [b"", b""]

    @pytest.mark.parametrize("content", [b"plan" * (1 << 18), os.urandom(300 << 10)], ids=["compressible", "random"])
    def test_values_of_any_size_cross_in_parts_that_a_store_takes(self, monkeypatch, content):
        def step(exchange):
            return exchange.together("x", lambda: content if exchange.rank else b"", lambda parts: parts[::-1])

        assert exchange_module._PART_BYTES <= 4 << 20
        monkeypatch.setattr(exchange_module, "_PART_BYTES", 64 << 10)
        world = World(2)
        world.store = Watched(world.store)
        assert world.run(step) == [content, b""]
        assert world.store.largest_bytes <= (64 << 10) + 16
        assert world.store.num_keys() == 0

    def test_a_rank_alone_needs_no_store(self):
        with Exchange(Place()) as exchange:
            assert exchange.together("x", lambda: b"part", lambda parts: [b"<%s>" % parts[0]]) == b"<part>"


class TestAFailure:
    @pytest.mark.parametrize("guilty", [0, 1, 2])
    def test_of_any_rank_is_every_ranks_failure_with_rank_and_cause(self, guilty):
        def step(exchange):
            def make():
                if exchange.rank == guilty:
                    raise DiskFull("/there", 2, 1)
                return b""

            return exchange.together("x", make, lambda parts: parts)

        outcomes = World(3).run(step)
        assert len({say(outcome) for outcome in outcomes}) == 1
        assert isinstance(outcomes[0], RankFailed)
        assert (outcomes[0].rank, outcomes[0].cause_code) == (guilty, "disk_full")
        assert isinstance(outcomes[guilty].__cause__, DiskFull)

    def test_that_names_its_rank_stays_what_it_is(self):
        def step(exchange):
            def make():
                raise UserCodeFailed(exchange.rank, "Reader.read_data", "ValueError: no")

            return exchange.together("x", make)

        outcomes = World(2).run(step)
        assert [say(outcome) for outcome in outcomes] == [
            "UserCodeFailed: rank 0: Reader.read_data failed: ValueError: no"
        ] * 2

    def test_of_the_answer_is_every_ranks_failure(self):
        def step(exchange):
            return exchange.together("x", lambda: b"", lambda parts: [parts[7]])

        outcomes = World(3).run(step)
        assert {say(outcome) for outcome in outcomes} == {"RankFailed: rank 0: IndexError('list index out of range')"}
        assert isinstance(outcomes[0].__cause__, IndexError)

    def test_to_answer_all_is_noticed(self):
        outcomes = World(2).run(lambda exchange: exchange.together("x", lambda: b"", lambda parts: parts[:1]))
        assert {say(outcome) for outcome in outcomes} == {"RankFailed: rank 0: 1 answers for 2 ranks"}

    def test_alone_is_the_error_itself(self):
        def make():
            raise DiskFull("/there", 2, 1)

        with pytest.raises(DiskFull), Exchange(Place()) as exchange:
            exchange.together("x", make)

    @pytest.mark.parametrize("guilty", [0, 1])
    def test_ctrl_c_stays_ctrl_c_on_its_rank_and_is_told_to_the_others(self, guilty):
        def step(exchange):
            def make():
                if exchange.rank == guilty:
                    raise KeyboardInterrupt
                return b""

            return exchange.together("x", make)

        outcomes = World(2).run(step)
        assert isinstance(outcomes[guilty], KeyboardInterrupt)
        assert say(outcomes[1 - guilty]) == f"RankFailed: rank {guilty}: interrupted by KeyboardInterrupt()"

    def test_after_a_failure_nothing_is_left_in_the_store(self):
        def step(exchange):
            exchange.together("x", lambda: b"", lambda parts: [parts[7]])

        world = World(3)
        world.run(step)
        assert world.store.num_keys() == 0


class TestWaiting:
    def test_a_rank_that_never_comes_is_named_to_all_that_did(self):
        world = World(3, HASTY)
        after = {0: "ckptd/test/planning/part/1", 1: "ckptd/test/beat/0"}  # the two are there before time runs

        def step(exchange):
            return exchange.together("planning", lambda: world.store.wait([after[exchange.rank]]) or b"")

        outcomes = world.run(step, ranks=[0, 1])
        assert len({say(outcome) for outcome in outcomes}) == 1
        assert (outcomes[0].rank, outcomes[0].cause_code) == (2, "deadline_exceeded")
        assert "planning: this rank did not come" in str(outcomes[0])

    def test_a_coordinator_that_never_comes_is_named(self):
        [outcome] = World(2, HASTY).run(lambda exchange: exchange.together("planning", lambda: b""), ranks=[1])
        assert (outcome.rank, outcome.cause_code) == (0, "deadline_exceeded")

    @pytest.mark.parametrize("silent", [0, 1])
    def test_a_rank_that_came_and_fell_silent_is_not_waited_for_for_long(self, silent):
        world = World(2, Patience(step_s=60.0, silence_s=0.05, beat_s=0.01))
        world.store.set(f"ckptd/test/beat/{silent}", "its last")
        [outcome] = world.run(lambda exchange: exchange.together("reading", lambda: b""), ranks=[1 - silent])
        assert outcome.rank == silent
        assert "no sign of life" in str(outcome)

    def test_every_new_sign_of_life_counts_anew(self):
        line = _Line(dist.HashStore(), "x", QUICK)
        assert line._silent_s(1, 1.0) is None
        for number in (0, 1):
            line.beat(1, number)
            assert line._silent_s(1, 10.0 + number) == 0.0
            assert line._silent_s(1, 25.0 + number) == 15.0

    def test_a_busy_rank_gives_signs_of_life_all_the_time(self):
        world = World(2)
        with world.exchange(1):
            world.store.wait(["ckptd/test/beat/1"])
            while world.store.get("ckptd/test/beat/1") in {b"0", b"1"}:  # its main thread is here and does nothing
                pass

    def test_signs_of_life_stay_until_the_last_rank_has_left(self):
        """Another rank may be about to read one; the store would make it wait for what does not come again."""
        world = World(2)
        with world.exchange(1):
            world.store.wait(["ckptd/test/beat/1"])
            with world.exchange(0):
                world.store.wait(["ckptd/test/beat/0"])
            assert world.store.check(["ckptd/test/beat/0"])
        assert world.store.num_keys() == 0

    def test_who_is_torn_out_of_a_step_falls_silent_instead_of_going_on_leave(self):
        world = World(2)
        with pytest.raises(KeyboardInterrupt), world.exchange(1):
            world.store.wait(["ckptd/test/beat/1"])
            raise KeyboardInterrupt
        assert world.store.check(["ckptd/test/beat/1"])

    def test_a_store_that_is_gone_ends_the_step(self):
        class Gone:
            def __getattr__(self, name):
                raise dist.DistNetworkError("Broken pipe")

        with pytest.raises(RankFailed, match="the process group's store is gone"):
            Exchange(Place(1, 2, Gone(), "x"), patience=QUICK).together("x", lambda: b"")


class TestThePlace:
    @pytest.fixture
    def world(self, monkeypatch):
        store, begun = dist.HashStore(), {}

        def place(me, ranks):
            monkeypatch.setattr(exchange_module, "dist", Initialised(ranks, me))
            monkeypatch.setattr(exchange_module, "_get_default_store", lambda: store)
            monkeypatch.setattr(exchange_module, "_begun", begun.setdefault(me, {}))
            return place_in(None, no_dist=False)

        return place

    def test_ranks_of_a_group_meet_under_one_prefix_another_one_each_time(self, world):
        first = [world(me, [0, 1]) for me in (0, 1)]
        second = [world(me, [0, 1]) for me in (1, 0)]
        assert first[0].prefix == first[1].prefix != second[0].prefix == second[1].prefix
        assert [place.rank for place in first] == [0, 1]

    def test_groups_do_not_meet_each_other(self, world):
        assert world(1, [0, 1]).prefix != world(1, [1, 2]).prefix
        assert world(1, list(range(1000))).prefix != world(1, list(range(1, 1001))).prefix

    def test_keys_stay_short_in_large_groups(self, world):
        assert len(world(0, list(range(10_000))).prefix) < 300

    def test_no_dist_and_no_group_are_a_place_alone(self, world):
        world(0, [0, 1])
        assert place_in(None, no_dist=True) == Place()

    def test_from_outside_the_group_nothing_can_be_done(self, monkeypatch):
        monkeypatch.setattr(exchange_module, "dist", Initialised([1, 2], 0))
        with pytest.raises(Unsupported, match="outside the process group"):
            place_in(None, no_dist=False)


class Initialised(FakeDist):
    """torch.distributed with a group."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def get_rank(self, group: object = None) -> int:
        return self.ranks.index(self.me) if self.me in self.ranks else -1
