"""A failure of a save or load is caught by our class, by torch's, by its own, and by `except Exception`."""

from __future__ import annotations

import copy
import dataclasses
import gc
import inspect
import pickle
import traceback
import weakref

import pytest
import torch
from support.clients import stock_load, stock_save
from torch.distributed.checkpoint import CheckpointException as TorchCheckpointException

from ckptd import client
from ckptd.client.failures import CheckpointException, as_checkpoint_failure, as_failure, failure_class
from ckptd.client.saving.futures import SaveFuture
from ckptd.protocol.errors import (
    BY_CODE,
    BadConfig,
    BadIndex,
    CkptdError,
    DiskFull,
    Mismatch,
    MissingKeys,
    RankFailed,
    RankLost,
    StorageError,
    UnknownCheckpoint,
    Unsupported,
    from_report,
)

SAMPLES = {"str": "some text", "int": 5, "float": 1.5}
KINDS = sorted((kind for kind in BY_CODE.values() if kind is not CkptdError), key=lambda kind: kind.code)
FULL = DiskFull("/runs", 10, 3)


def sample(kind: type[CkptdError]) -> CkptdError:
    return kind(**{field.name: SAMPLES[field.type] for field in dataclasses.fields(kind)})


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.code)
class TestEveryKind:
    @pytest.mark.parametrize("caught_as", ["torch's", "ours", "its own", "any"])
    def test_is_caught(self, kind, caught_as):
        names = {"torch's": TorchCheckpointException, "ours": CheckpointException, "its own": kind, "any": Exception}
        with pytest.raises(names[caught_as]) as caught:
            raise as_failure(sample(kind))
        assert str(caught.value) == str(sample(kind))

    def test_keeps_its_facts_and_its_code(self, kind):
        error, failure = sample(kind), as_failure(sample(kind))
        assert failure.report() == error.report()
        received = from_report(failure.report())
        assert type(received) is kind
        assert {name: getattr(failure, name) for name in vars(error)} == vars(error)

    @pytest.mark.parametrize("again", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy], ids=["pickled", "copied"])
    def test_comes_back_as_it_was(self, kind, again):
        failure = as_failure(sample(kind), rank=3)
        received = again(failure)
        assert type(received) is type(failure)
        assert (str(received), received.report()) == (str(failure), failure.report())
        assert {rank: str(error) for rank, (error, _) in received.failures.items()} == {
            rank: str(error) for rank, (error, _) in failure.failures.items()
        }

    def test_is_told_in_one_line_and_by_its_name(self, kind):
        failure = as_failure(sample(kind))
        [told] = traceback.format_exception_only(failure)
        assert told == f"ckptd.client.failures.{kind.__name__}: {sample(kind)}\n"
        assert repr(failure) == repr(sample(kind))


class TestWhoseFailureItIs:
    def test_the_error_says_so_itself(self):
        assert set(as_failure(RankLost(3, 4711, "died"), rank=1).failures) == {3}
        assert set(as_failure(RankFailed(2, "disk_full", "full")).failures) == {2}

    def test_or_the_caller(self):
        assert set(as_failure(FULL, rank=7).failures) == {7}

    def test_or_it_is_our_own(self):
        assert set(as_failure(FULL).failures) == {0}


def test_where_it_was_raised_is_told_as_torch_tells_it():
    def careless():
        raise FULL

    with pytest.raises(CheckpointException) as caught, as_checkpoint_failure():
        careless()
    error, frames = caught.value.failures[0]
    assert type(error) is DiskFull
    assert frames[-1].name == "careless"
    assert isinstance(frames, traceback.StackSummary)


def test_a_traceback_shows_the_error_once():
    with pytest.raises(DiskFull) as caught, as_checkpoint_failure():
        raise FULL
    text = "".join(traceback.format_exception(caught.value))
    assert text.count(str(FULL)) == 1


def test_a_cause_stays_the_cause():
    with pytest.raises(DiskFull) as caught, as_checkpoint_failure():
        raise DiskFull("/runs", 10, 3) from OSError(28, "no space")
    assert isinstance(caught.value.__cause__, OSError)


def test_a_failure_is_made_once():
    failure = as_failure(FULL)
    assert as_failure(failure) is failure
    assert failure_class(DiskFull) is type(as_failure(FULL))


@pytest.mark.parametrize("error", [Unsupported("x", "y"), BadConfig("p", "r"), ValueError("z"), KeyboardInterrupt()])
def test_wrong_usage_and_what_is_not_ours_stay_what_they_are(error):
    with pytest.raises(type(error)) as caught, as_checkpoint_failure():
        raise error
    assert caught.value is error
    assert not isinstance(caught.value, TorchCheckpointException)


def test_a_function_is_wrapped_with_its_signature():
    @as_checkpoint_failure()
    def load(state_dict: dict, *, planner: object = None) -> int:
        """Load."""
        if planner:
            raise FULL
        return len(state_dict)

    assert str(inspect.signature(load)) == "(state_dict: 'dict', *, planner: 'object' = None) -> 'int'"
    assert load({1: 1}) == 1
    with pytest.raises(CheckpointException):
        load({}, planner=1)


def test_ours_can_be_made_as_torchs():
    failure = CheckpointException("write", {1: (OSError("gone"), traceback.StackSummary.from_list([]))})
    assert failure.failures[1][0].args == ("gone",)
    assert "gone" in str(failure)
    assert isinstance(failure, Exception)


class TestFutures:
    def failed(self, error):
        future = SaveFuture("/runs/7", lambda: None)
        future.note_failed(error)
        return future

    def test_a_failed_save_is_a_checkpoint_exception(self):
        future = self.failed(RankLost(3, 4711, "died"))
        for outcome in (future, future.staging_completion):
            with pytest.raises(TorchCheckpointException, match="rank 3") as caught:
                outcome.result(timeout=0)
            assert isinstance(caught.value, RankLost)
        assert isinstance(future.exception(), CheckpointException)
        assert set(future.exception().failures) == {3}

    def test_staging_that_failed_is_one_too(self):
        future = SaveFuture("/runs/7", lambda: None)
        future.note_staging_failed(FULL)
        assert isinstance(future.staging_completion.exception(), CheckpointException)
        assert not future.done()

    def test_so_is_metadata_that_cannot_be_read(self):
        def unreadable():
            raise BadIndex("/runs/7", "overwritten")

        future = SaveFuture("/runs/7", unreadable)
        future.note_committed()
        with pytest.raises(CheckpointException, match="overwritten"):
            future.result(timeout=0)

    def test_a_failed_future_does_not_hold_what_was_being_saved(self):
        class Tensor:
            pass

        def stage():
            tensor = Tensor()
            held.append(weakref.ref(tensor))
            raise DiskFull("/runs", 10, 3)

        held = []
        future = SaveFuture("/runs/7", lambda: None)
        try:
            stage()
        except DiskFull as error:
            future.note_failed(error)
        gc.collect()
        assert held[0]() is None
        frames = future.exception().failures[0][1]
        assert frames[-1].name == "stage"


class TestLoads:
    """What torch reports as a CheckpointException from `load` is one here, under the name of its cause."""

    @pytest.fixture
    def checkpoint(self, tmp_path):
        stock_save({"w": torch.ones(3), "n": 1}, tmp_path / "c")
        return tmp_path / "c"

    @pytest.mark.parametrize(
        ("wanted", "cause"),
        [({"x": torch.zeros(3)}, MissingKeys), ({"w": torch.zeros(4)}, Mismatch), ({"w": 1}, Mismatch)],
        ids=["missing", "shape", "kind"],
    )
    def test_a_state_dict_that_does_not_fit(self, checkpoint, wanted, cause):
        with pytest.raises(TorchCheckpointException) as theirs:
            stock_load(dict(wanted), checkpoint)
        with pytest.raises(TorchCheckpointException) as ours:
            client.load(dict(wanted), checkpoint_id=checkpoint)
        assert isinstance(ours.value, cause)
        assert list(ours.value.failures) == list(theirs.value.failures) == [0]

    def test_no_checkpoint_at_all(self, tmp_path):
        with pytest.raises(TorchCheckpointException) as caught:
            client.load({"w": torch.zeros(3)}, checkpoint_id=tmp_path / "nowhere")
        assert isinstance(caught.value, UnknownCheckpoint)

    def test_a_file_that_was_cut_short(self, checkpoint):
        [image] = checkpoint.glob("*.distcp")
        image.write_bytes(image.read_bytes()[:100])
        with pytest.raises(TorchCheckpointException) as caught:
            client.load({"w": torch.zeros(3)}, checkpoint_id=checkpoint)
        assert isinstance(caught.value, StorageError)

    def test_no_place_is_named_is_wrong_usage(self):
        with pytest.raises(Unsupported) as caught:
            client.load({"w": torch.zeros(3)})
        assert not isinstance(caught.value, TorchCheckpointException)
