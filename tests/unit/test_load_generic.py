"""Loads with users' own planners and readers: DCP's calls in DCP's order, alone and with other ranks."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from support.clients import stock_load, stock_save
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from ckptd.client.loading import generic as load_generic
from ckptd.client.loading.generic import load_with
from ckptd.client.session.exchange import Patience, Place
from ckptd.protocol.errors import RankMismatch, UnknownCheckpoint, UserCodeFailed

PATIENCE = Patience(step_s=20.0, silence_s=20.0, beat_s=0.05)
CALLS = [
    *["reset", "read_metadata", "set_up_planner", "set_up_storage_reader", "create_local_plan", "prepare_local_plan"],
    *["create_global_plan", "prepare_global_plan", "finish_plan", "read_data"],
]


class Recorder:
    """Whoever is called: notes it, and fails where the test wants it to."""

    def __init__(self, calls, fail_in=None):
        self.calls, self.fail_in = calls, fail_in

    def note(self, name, *what):
        self.calls.append((name, *what))
        if self.fail_in == name:
            raise ValueError(f"{name} does not work")


class Planner(Recorder, LoadPlanner):
    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False):
        self.note("set_up_planner", is_coordinator)
        self.state_dict, self.metadata = state_dict, metadata

    def create_local_plan(self):
        self.note("create_local_plan")
        return LoadPlan([], planner_data=self.metadata.planner_data)

    def create_global_plan(self, global_plan):
        self.note("create_global_plan", len(global_plan))
        return [replace(plan, planner_data=f"{plan.planner_data}-{n}") for n, plan in enumerate(global_plan)]

    def finish_plan(self, central_plan):
        self.note("finish_plan", central_plan.planner_data)
        return central_plan

    def load_bytes(self, read_item, value):
        raise AssertionError

    resolve_tensor = commit_tensor = load_bytes


class Reader(Recorder, StorageReader):
    def reset(self, checkpoint_id=None):
        self.note("reset", checkpoint_id)

    def read_metadata(self):
        self.note("read_metadata")
        return Metadata({}, planner_data="told")

    def set_up_storage_reader(self, metadata, is_coordinator):
        self.note("set_up_storage_reader", is_coordinator)

    def prepare_local_plan(self, plan):
        self.note("prepare_local_plan")
        return plan

    def prepare_global_plan(self, plans):
        self.note("prepare_global_plan", len(plans))
        return [replace(plan, storage_data=n) for n, plan in enumerate(plans)]

    def read_data(self, plan, planner):
        self.note("read_data", plan.storage_data)
        planner.state_dict["w"] = plan.planner_data
        return done()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id):
        return True


def done():
    future = Future()
    future.set_result(None)
    return future


class RankReader(Reader):
    """Knows no global metadata, but some of each rank."""

    def read_metadata(self, **kwargs):
        self.note("read_metadata", *kwargs.values())
        if "rank" not in kwargs:
            raise FileNotFoundError("no .metadata")
        return Metadata({}, planner_data=f"rank {kwargs['rank']}")

    def set_up_storage_reader(self, metadata, is_coordinator, **kwargs):
        self.note("set_up_storage_reader", is_coordinator, *kwargs.items())


@pytest.fixture
def on_ranks(monkeypatch):
    """Run a load on several ranks, as threads with a store of torch's own."""
    monkeypatch.setattr(load_generic, "place_in", lambda group, *, no_dist: group)  # a place goes as the group

    def run(count, load):
        store = dist.HashStore()

        def one(rank):
            try:
                return load(rank, Place(rank, count, store, "ckptd/test"))
            except Exception as error:  # noqa: BLE001  # the test looks at it
                return error

        with ThreadPoolExecutor(count) as pool:
            outcomes = list(pool.map(one, range(count)))
        assert store.num_keys() == 0
        return outcomes

    return run


class TestTheProtocol:
    def test_alone_every_call_comes_once_and_in_order(self):
        calls = []
        state = {"w": None}
        load_with(state, reader=Reader(calls), planner=Planner(calls), no_dist=True, checkpoint_id="there")
        assert [call[0] for call in calls] == CALLS
        assert calls[0] == ("reset", "there")
        assert ("set_up_planner", True) in calls
        assert state == {"w": "told-0"}

    def test_a_reader_without_an_id_is_left_as_it_is(self):
        calls = []
        state = {}
        load_with(state, reader=Reader(calls), planner=Planner(calls), no_dist=True)
        assert calls[0] == ("read_metadata",)
        assert state == {}  # names that were not asked for are not handed back

    def test_of_several_ranks_the_coordinator_sees_all_plans_and_each_gets_its_own(self, on_ranks):
        calls = [[] for _ in range(3)]

        def load(rank, place):
            state = {"w": None}
            load_with(state, reader=Reader(calls[rank]), planner=Planner(calls[rank]), process_group=place)
            return state["w"]

        assert on_ranks(3, load) == ["told-0", "told-1", "told-2"]
        assert ("create_global_plan", 3) in calls[0]
        assert ("prepare_global_plan", 3) in calls[0]
        for rank in (1, 2):
            names = [call[0] for call in calls[rank]]
            assert names == [call for call in CALLS[1:] if "global" not in call]
            assert ("set_up_storage_reader", False) in calls[rank]
            assert calls[rank][-1] == ("read_data", rank)

    def test_plans_that_nobody_would_look_at_do_not_cross(self, on_ranks, tmp_path):
        stock_save({"w": torch.arange(6)}, tmp_path / "a")

        class Own(DefaultLoadPlanner):
            def create_local_plan(self):
                plan = super().create_local_plan()
                return replace(plan, planner_data=threading.Lock())  # which nothing can pickle

        def load(rank, place):
            state = {"w": torch.zeros(6, dtype=torch.int64)}
            load_with(state, reader=FileSystemReader(tmp_path / "a"), planner=Own(), process_group=place)
            return state["w"].tolist()

        assert on_ranks(2, load) == [[0, 1, 2, 3, 4, 5]] * 2

    def test_plans_that_cannot_be_pickled_are_refused_on_all_ranks(self, on_ranks):
        class Own(Planner):
            def create_local_plan(self):
                return LoadPlan([], planner_data=threading.Lock())

        outcomes = on_ranks(2, lambda _, place: load_with({}, reader=Reader([]), planner=Own([]), process_group=place))
        assert len({str(outcome) for outcome in outcomes}) == 1
        assert "rank 0: pickling the local plan failed: TypeError" in str(outcomes[0])


class TestMetadataOfARank:
    def test_each_rank_plans_for_itself(self, on_ranks):
        calls = [[], []]

        def load(rank, place):
            state = {"w": None}
            load_with(state, reader=RankReader(calls[rank]), planner=Planner(calls[rank]), process_group=place)
            return state["w"]

        assert on_ranks(2, load) == ["rank 0-0", "rank 1-0"]
        assert ("create_global_plan", 1) in calls[1]
        assert ("set_up_storage_reader", False, ("rank", 1), ("use_collectives", False)) in calls[1]

    def test_mixed_with_global_metadata_is_refused(self, on_ranks):
        def load(rank, place):
            load_with({}, reader=(Reader, RankReader)[rank]([]), planner=Planner([]), process_group=place)

        outcomes = on_ranks(2, load)
        assert [type(outcome) for outcome in outcomes] == [RankMismatch] * 2
        assert outcomes[0].rank == 1

    def test_of_neither_kind_is_the_first_reason(self):
        class Nothing(RankReader):
            def read_metadata(self, **kwargs):
                raise FileNotFoundError(f"nothing for {kwargs}")

        with pytest.raises(UserCodeFailed, match=r"Nothing.read_metadata failed: FileNotFoundError: nothing for {}"):
            load_with({}, reader=Nothing([]), planner=Planner([]), no_dist=True)


class TestFailures:
    @pytest.mark.parametrize("where", CALLS)
    def test_of_any_call_name_it_and_keep_the_cause(self, where):
        reader, planner = Reader([], where), Planner([], where)
        with pytest.raises(UserCodeFailed, match=f"rank 0: .*{where} failed: ValueError: {where} does not") as caught:
            load_with({}, reader=reader, planner=planner, no_dist=True, checkpoint_id="there")
        assert isinstance(caught.value.__cause__, ValueError)
        assert len(reader.calls) + len(planner.calls) == CALLS.index(where) + 1

    @pytest.mark.parametrize("where", ["read_metadata", "create_local_plan", "read_data"])
    def test_of_one_rank_are_all_ranks_failures(self, on_ranks, where):
        def load(rank, place):
            reader, planner = Reader([], where if rank == 1 else None), Planner([], where if rank == 1 else None)
            load_with({}, reader=reader, planner=planner, process_group=place, patience=PATIENCE)

        outcomes = on_ranks(3, load)
        assert [type(outcome) for outcome in outcomes] == [UserCodeFailed] * 3
        assert len({str(outcome) for outcome in outcomes}) == 1
        assert outcomes[0].rank == 1

    def test_of_the_global_plan_are_all_ranks_failures(self, on_ranks):
        def load(rank, place):
            load_with({}, reader=Reader([]), planner=Planner([], "create_global_plan"), process_group=place)

        outcomes = on_ranks(2, load)
        assert {str(outcome) for outcome in outcomes} == {
            "rank 0: Planner.create_global_plan failed: ValueError: create_global_plan does not work"
        }

    def test_of_ours_stay_what_they_are(self):
        class Ours(Reader):
            def read_metadata(self):
                raise UnknownCheckpoint("/there")

        with pytest.raises(UnknownCheckpoint):
            load_with({}, reader=Ours([]), planner=Planner([]), no_dist=True)

    def test_of_a_future_are_failures_of_the_reader(self):
        class Late(Reader):
            def read_data(self, plan, planner):
                future = Future()
                future.set_exception(OSError("the disk is gone"))
                return future

        with pytest.raises(UserCodeFailed, match=r"Late.read_data failed: .*the disk is gone"):
            load_with({}, reader=Late([]), planner=Planner([]), no_dist=True)

    def test_nothing_is_handed_back_after_one(self, on_ranks):
        class Model:
            loaded = False

            def state_dict(self):
                return {"w": 1}

            def load_state_dict(self, state_dict):
                self.loaded = True

        models = [Model(), Model()]

        def load(rank, place):
            reader = Reader([], "read_data" if rank else None)
            load_with({"m": models[rank]}, reader=reader, planner=Planner([]), process_group=place)

        assert [type(outcome) for outcome in on_ranks(2, load)] == [UserCodeFailed] * 2
        assert [model.loaded for model in models] == [False, False]


class Model:
    """Stateful."""

    def __init__(self, value):
        self.w, self.steps = torch.full((4,), value), int(value)

    def state_dict(self):
        return {"w": self.w, "steps": self.steps}

    def load_state_dict(self, state_dict):
        self.w, self.steps = state_dict["w"], state_dict["steps"]


class TestWithTorchsOwn:
    @pytest.fixture
    def checkpoint(self, tmp_path):
        stock_save({"model": Model(3.0), "list": [torch.ones(2), {"x": 5}], "epoch": 7}, tmp_path / "a")
        return tmp_path / "a"

    def test_stateful_values_nested_ones_and_objects_come_back(self, checkpoint):
        model = Model(0.0)
        state = {"model": model, "list": [torch.zeros(2), {"x": 0}], "epoch": 0}
        load_with(state, reader=FileSystemReader(checkpoint), planner=DefaultLoadPlanner(), no_dist=True)
        assert state["model"] is model
        assert (model.w.tolist(), model.steps) == ([3.0] * 4, 3)
        assert (state["list"][0].tolist(), state["list"][1], state["epoch"]) == ([1.0, 1.0], {"x": 5}, 7)

    def test_a_planner_that_renames_keys(self, checkpoint):
        class Rename(DefaultLoadPlanner):
            """After the example in the docstring of torch's LoadPlanner."""

            def set_up_planner(self, state_dict, metadata=None, is_coordinator=False):
                self.outer = state_dict
                inner = {"model": state_dict["net"]}
                super().set_up_planner(inner, metadata, is_coordinator)

            def load_bytes(self, read_item, value):
                super().load_bytes(read_item, value)
                self.outer["net"] = self.original_state_dict["model"]

        state = {"net": {"w": torch.zeros(4), "steps": 0}}
        load_with(state, reader=FileSystemReader(checkpoint), planner=Rename(), no_dist=True)
        assert (state["net"]["w"].tolist(), state["net"]["steps"]) == ([3.0] * 4, 3)

    def test_a_reader_that_changes_what_it_reads(self, checkpoint):
        class Doubling(FileSystemReader):
            def read_data(self, plan, planner):
                future = super().read_data(plan, planner)
                planner.lookup_tensor(plan.items[0].dest_index).mul_(2)
                return future

        state = {"model": {"w": torch.zeros(4)}}
        load_with(state, reader=Doubling(checkpoint), planner=DefaultLoadPlanner(), no_dist=True)
        assert state["model"]["w"].tolist() == [6.0] * 4

    def test_missing_keys_and_wrong_shapes_are_as_with_torch(self, checkpoint):
        for wanted in ({"nothing": torch.zeros(1)}, {"model": {"w": torch.zeros(5)}}):
            with pytest.raises(CheckpointException) as torchs:
                stock_load(dict(wanted), checkpoint)
            with pytest.raises(UserCodeFailed) as ours:
                load_with(wanted, reader=FileSystemReader(checkpoint), planner=DefaultLoadPlanner(), no_dist=True)
            (cause, _) = torchs.value.failures[0]
            assert str(cause) in str(ours.value)

    def test_partial_loads_leave_the_rest_alone(self, checkpoint):
        state = {"epoch": 0, "more": torch.full((2,), 9.0)}
        planner = DefaultLoadPlanner(allow_partial_load=True)
        load_with(state, reader=FileSystemReader(checkpoint), planner=planner, no_dist=True)
        assert (state["epoch"], state["more"].tolist()) == (7, [9.0, 9.0])

    def test_a_damaged_metadata_file_is_the_readers_failure(self, checkpoint):
        (checkpoint / ".metadata").write_bytes(b"no pickle")
        with pytest.raises(UserCodeFailed, match=r"FileSystemReader.read_metadata failed"):
            load_with({}, reader=FileSystemReader(checkpoint), planner=DefaultLoadPlanner(), no_dist=True)


def test_metadata_without_tensors_is_enough():
    """A reader may know nothing of files."""

    class Constant(Reader):
        def read_metadata(self):
            size = torch.Size([2])
            return Metadata({"w": TensorStorageMetadata(TensorProperties(), size, [])})

        def read_data(self, plan, planner):
            planner.state_dict["w"].fill_(4.0)
            return done()

    state = {"w": torch.zeros(2)}
    load_with(state, reader=Constant([]), planner=DefaultLoadPlanner(allow_partial_load=True), no_dist=True)
    assert state["w"].tolist() == [4.0, 4.0]
