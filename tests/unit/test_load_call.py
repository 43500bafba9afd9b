"""`load` and `load_state_dict` as they are called: torch's arguments, ours, and who is asked to read."""

from __future__ import annotations

import gc
import inspect

import pytest
import torch
import torch.distributed.checkpoint as stock
from support.checkpoints import write_checkpoint
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException

from ckptd.checkpoint.storage.filesystem import FileSystemReader as OurReader
from ckptd.client.loading import loader
from ckptd.client.loading import sources as load_sources
from ckptd.client.loading.loader import load, load_state_dict
from ckptd.protocol.errors import Mismatch, MissingKeys, UnknownCheckpoint, Unsupported, WrongBits


@pytest.fixture
def checkpoint(tmp_path) -> str:
    write_checkpoint(tmp_path)
    return str(tmp_path)


class MyPlanner(DefaultLoadPlanner):
    pass


class MyReader(FileSystemReader):
    pass


@pytest.fixture
def passed_on(monkeypatch):
    """What is passed on to be called as DCP would."""
    calls = []
    monkeypatch.setattr(loader, "load_with", lambda state_dict, **arguments: calls.append(arguments))
    return calls


@pytest.mark.parametrize("name", ["load", "load_state_dict"])
def test_torchs_arguments_come_first_and_mean_the_same(name):
    ours = inspect.signature(getattr(loader, name)).parameters
    torchs = inspect.signature(getattr(stock, name)).parameters
    shared = list(ours)[: len(torchs)]
    assert shared == list(torchs)
    assert [ours[key].default for key in shared] == [torchs[key].default for key in shared]
    assert [ours[key].kind for key in shared] == [torchs[key].kind for key in shared]


class TestTheFastPath:
    @pytest.mark.parametrize(
        "arguments",
        [
            lambda path: {"checkpoint_id": path},
            lambda path: {"storage_reader": FileSystemReader(path)},
            lambda path: {"storage_reader": FileSystemReader("/nowhere"), "checkpoint_id": path},
            lambda path: {"checkpoint_id": path, "planner": DefaultLoadPlanner(), "no_dist": True},
        ],
    )
    def test_is_taken_for_torchs_own_classes(self, checkpoint, passed_on, arguments):
        state = {"epoch": 0}
        report = load(state, **arguments(checkpoint))
        assert (state["epoch"], report.loaded, report.path) == (7, 1, checkpoint)
        assert passed_on == []

    def test_a_planner_may_let_keys_be_missing_but_no_shape_be_wrong(self, checkpoint):
        planner = DefaultLoadPlanner(allow_partial_load=True)
        assert load({"epoch": 0, "no": 1}, checkpoint_id=checkpoint, planner=planner).missing == ("no",)
        with pytest.raises(Mismatch):
            load({"model.w": torch.zeros(1)}, checkpoint_id=checkpoint, planner=planner)

    def test_a_planner_may_take_the_top_level_as_it_is(self, checkpoint):
        state = {"model.step": torch.tensor(0)}
        load(state, checkpoint_id=checkpoint, planner=DefaultLoadPlanner(flatten_state_dict=False))
        assert state["model.step"] != 0

    def test_rules_are_passed_on(self, checkpoint):
        state = {"model": {"w": torch.zeros(4, 6, dtype=torch.float64)}, "no": 1}
        report = load(state, checkpoint_id=checkpoint, strict={"no": False})
        assert (report.missing, [other.name for other in report.converted]) == (("no",), ["model.w"])
        with pytest.raises(Mismatch):
            load(state, checkpoint_id=checkpoint, strict={"no": False}, convert_dtype=False)

    def test_hashes_are_held_unless_told_otherwise(self, checkpoint, tmp_path):
        file = tmp_path / "__0_0.distcp"
        file.write_bytes(bytes(byte ^ 1 for byte in file.read_bytes()))
        state = {"model": {"w": torch.zeros(4, 6)}}
        with pytest.raises(WrongBits):
            load(state, checkpoint_id=checkpoint)
        load(state, checkpoint_id=checkpoint, verify=False)


class TestOnesOwnPlannerOrReader:
    def test_a_planner_is_called_with_a_reader_of_the_path(self, checkpoint, passed_on):
        planner = MyPlanner()
        assert load({}, checkpoint_id=checkpoint, planner=planner, no_dist=True) is None
        [call] = passed_on
        assert call["planner"] is planner
        assert str(call["reader"].path) == checkpoint
        assert (call["no_dist"], call["process_group"]) == (True, None)

    def test_a_reader_is_called_with_a_default_planner_and_the_id_as_it_is(self, passed_on):
        reader = MyReader("/nowhere")
        assert load({}, checkpoint_id="step-7", storage_reader=reader) is None
        [call] = passed_on
        assert call["reader"] is reader
        assert isinstance(call["planner"], stock.planner.LoadPlanner)
        assert call["checkpoint_id"] == "step-7"

    def test_a_url_is_read_by_the_reader_for_it(self, passed_on):
        load({}, checkpoint_id="memory://bucket/step-7")
        [call] = passed_on
        assert type(call["reader"]).__name__ == "FsspecReader"
        assert call["checkpoint_id"] == "memory://bucket/step-7"

    def test_our_own_reader_of_directories_is_no_such(self, checkpoint, passed_on):
        assert load({"epoch": 0}, storage_reader=OurReader(checkpoint)).loaded == 1
        assert passed_on == []

    @pytest.mark.parametrize("rules", [{"strict": False}, {"convert_dtype": False}, {"verify": False}])
    def test_rules_of_ours_do_not_bind_them(self, checkpoint, rules):
        with pytest.raises(Unsupported, match="planner or reader"):
            load({}, checkpoint_id=checkpoint, planner=MyPlanner(), **rules)

    def test_they_really_load(self, checkpoint, tmp_path):
        with pytest.warns(UserWarning, match="single process"):
            stock.save({"w": torch.arange(5)}, checkpoint_id=tmp_path / "stock", no_dist=True)
        state = {"w": torch.zeros(5, dtype=torch.int64)}
        load(state, checkpoint_id=str(tmp_path / "stock"), planner=MyPlanner(), no_dist=True)
        assert torch.equal(state["w"], torch.arange(5))


class TestFailures:
    @pytest.mark.parametrize(
        ("state", "kind"),
        [({"no": 1}, MissingKeys), ({"model": {"w": 5}}, Mismatch)],
    )
    def test_are_of_their_kind_and_checkpoint_exceptions(self, checkpoint, state, kind):
        for wanted in (kind, CheckpointException):
            with pytest.raises(wanted) as caught:
                load(state, checkpoint_id=checkpoint)
            assert isinstance(caught.value.failures[0][0], kind)

    def test_no_checkpoint_is_one(self, tmp_path):
        with pytest.raises(CheckpointException) as caught:
            load({}, checkpoint_id=tmp_path)
        assert isinstance(caught.value, UnknownCheckpoint)

    @pytest.mark.parametrize("checkpoint_id", [None, "", "a\0b"])
    def test_wrong_usage_is_none(self, checkpoint_id):
        with pytest.raises(Unsupported) as caught:
            load({}, checkpoint_id=checkpoint_id)
        assert not isinstance(caught.value, CheckpointException)


def test_the_deprecated_name_warns_and_loads(checkpoint):
    state = {"epoch": 0}
    with pytest.warns(FutureWarning, match="Please use `load` instead"):
        assert load_state_dict(state, FileSystemReader(checkpoint)) is None
    assert state["epoch"] == 7


def test_the_collector_rests_while_a_load_is_planned_and_readers_work(checkpoint, monkeypatch):
    resting = []
    for where, name in ((load_sources.LoadPlan, "__init__"), (load_sources, "read_all")):
        real = getattr(where, name)
        monkeypatch.setattr(
            where, name, lambda *a, _real=real, **k: (resting.append(not gc.isenabled()), _real(*a, **k))[1]
        )
    load({}, checkpoint_id=checkpoint)
    assert resting == [True, True]
    assert gc.isenabled()
