"""``on_failure`` at work: raised, insisted on, agreed on by all ranks."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from ckptd.client import failure_policy
from ckptd.client.failure_policy import FailureOptions, FailurePolicy
from ckptd.client.failures import CheckpointException
from ckptd.client.saving.futures import SaveFuture
from ckptd.client.session.exchange import Place
from ckptd.client.session.sessions import connect
from ckptd.protocol.errors import DaemonUnavailable, DiskFull, SavesFailing, SystemCallFailed, Unsupported
from ckptd.protocol.transient import Backoff

FULL = DiskFull("/runs", 10, 3)
QUICK = Backoff(1 << 62, 0.001, 0.001)


def policy(place=Place, **options):
    return FailurePolicy(FailureOptions(**{"pauses": QUICK, **options}), place=place)


def ended(error=None):
    """Return what begins a save that has ended."""

    def begin():
        future = SaveFuture("/runs/step-1", lambda: None)
        future.note_committed() if error is None else future.note_failed(error)
        return future

    return begin


class Saves:
    """Saves that end as they are told to, one after the other; an error that is raised begins none."""

    def __init__(self, *outcomes):
        self.outcomes, self.begun = list(outcomes), 0

    def __call__(self):
        self.begun += 1
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, DaemonUnavailable | Unsupported | KeyboardInterrupt):
            raise outcome
        return ended(outcome)()


def test_continue_logs_and_counts(caplog):
    mine = policy()
    assert mine.save(ended(FULL)).state == "failed"
    assert mine.save(ended(FULL)).state == "failed"
    assert (mine.count.in_all, mine.count.in_a_row) == (2, 2)
    assert isinstance(mine.count.last, DiskFull)
    assert "save of /runs/step-1 failed, 2 in a row: /runs: 10 bytes wanted" in caplog.text
    mine.save(ended())
    assert (mine.count.in_all, mine.count.in_a_row, mine.count.last) == (2, 0, None)


def test_raise_raises_at_the_next_call_and_saves_nothing():
    mine, saves = policy(on_failure="raise"), Saves(FULL, None)
    mine.save(saves)
    with pytest.raises(DiskFull) as caught:
        mine.save(saves)
    assert isinstance(caught.value, CheckpointException)
    assert saves.begun == 1
    assert mine.save(saves).state == "committed"


def test_raise_does_not_repeat_what_a_blocking_save_has_raised():
    mine = policy(on_failure="raise")
    mine.save(ended(FULL), told=True)
    assert mine.save(ended()).state == "committed"


def test_the_limit_ends_a_run_that_only_logs():
    mine = policy(max_consecutive_failures=2)
    mine.save(ended(FULL))
    mine.save(ended(FULL))
    with pytest.raises(SavesFailing, match="2 saves in a row"):
        mine.save(ended())


class TestWithoutADaemon:
    GONE = DaemonUnavailable("/run", "gone")

    def test_the_first_save_raises_whatever_was_told(self):
        for on_failure in ("continue", "raise", "pause"):
            with pytest.raises(DaemonUnavailable):
                policy(on_failure=on_failure, catches=True).save(Saves(self.GONE), checkpoint_id="/runs/step-1")

    def test_a_later_one_has_failed_and_the_next_one_is_tried(self):
        mine, saves = policy(catches=True), Saves(None, self.GONE, None)
        mine.save(saves, checkpoint_id="/runs/step-1")
        failed = mine.save(saves, checkpoint_id="/runs/step-2")
        assert (failed.state, failed.checkpoint_id) == ("failed", "/runs/step-2")
        assert failed.staging_completion.exception() is not None
        with pytest.raises(DaemonUnavailable):
            failed.result()
        assert mine.count.in_a_row == 1
        assert mine.save(saves, checkpoint_id="/runs/step-3").state == "committed"

    def test_it_raises_where_nobody_asked_for_more(self):
        mine, saves = policy(), Saves(None, self.GONE)
        mine.save(saves, checkpoint_id="/runs/step-1")
        with pytest.raises(DaemonUnavailable):
            mine.save(saves, checkpoint_id="/runs/step-2")


class TestPause:
    def test_saves_again_and_again_until_it_works(self, caplog):
        mine, saves = policy(on_failure="pause"), Saves(FULL, FULL, DaemonUnavailable("/run", "gone"), FULL, None, None)
        mine.save(saves)
        assert mine.save(saves).state == "committed"
        assert saves.begun == 5
        assert "training pauses until a save works again" in caplog.text
        mine.save(saves)
        assert saves.begun == 6

    def test_gives_up_at_its_deadline_with_the_last_cause(self, monkeypatch):
        now = [0.0]
        monkeypatch.setattr(failure_policy.time, "monotonic", lambda: now[0])
        monkeypatch.setattr(failure_policy.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
        mine = policy(on_failure="pause", pause_timeout_s=10.0, pauses=Backoff(1 << 62, 1.0, 30.0))
        last = SystemCallFailed("pwrite", "/x", 30)
        saves = Saves(FULL, FULL, FULL, last, last, last)
        mine.save(saves)
        with pytest.raises(SystemCallFailed, match="pwrite"):
            mine.save(saves)
        assert (now[0], saves.begun) == (7.0, 5)  # 1 + 2 + 4; 8 more would be too late

    @pytest.mark.parametrize("wrong", [Unsupported("x", "y"), KeyboardInterrupt()])
    def test_does_not_hold_back_what_is_no_failure_of_storage(self, wrong):
        mine, saves = policy(on_failure="pause"), Saves(FULL, wrong)
        mine.save(saves)
        with pytest.raises(type(wrong)):
            mine.save(saves)


@pytest.mark.parametrize(
    "options",
    [{"on_failure": "explode"}, {"max_consecutive_failures": 0}, {"pause_timeout_s": 0}, {"pause_timeout_s": 1e9}],
)
def test_what_cannot_be_is_refused(options):
    for call in (FailureOptions, connect):  # before anything is opened
        with pytest.raises(Unsupported):
            call(**options)


class TestRanks:
    """Some ranks, as threads: each hears of failures at a moment of its own."""

    def run(self, what, size=2, **options):
        store = dist.HashStore()

        def one(rank):
            exchanges = iter(range(1000))
            place = lambda: Place(rank, size, store, f"test/{next(exchanges)}")  # noqa: E731
            try:
                return what(rank, policy(place, **options))
            except Exception as error:  # noqa: BLE001  # the test looks at it
                return error

        logging.getLogger("ckptd").setLevel(logging.ERROR)
        try:
            with ThreadPoolExecutor(size) as pool:
                return list(pool.map(one, range(size)))
        finally:
            logging.getLogger("ckptd").setLevel(logging.NOTSET)

    def test_what_one_has_heard_is_raised_by_all(self):
        def what(rank, mine):
            late = SaveFuture("/runs/step-1", lambda: None)
            mine.save(ended(FULL) if rank == 1 else lambda: late)
            try:
                mine.save(ended())
            except DiskFull as error:
                late.note_failed(FULL)  # rank 0 hears only now
                assert mine.save(ended()).state == "committed"
                return str(error)

        assert self.run(what, on_failure="raise") == [str(FULL)] * 2

    @pytest.mark.parametrize("loser", [0, 1])
    def test_a_save_that_failed_for_one_has_failed(self, loser):
        def what(rank, mine):
            mine.save(ended(FULL if rank == loser else None))
            with pytest.raises(DiskFull):
                mine.save(ended())
            return mine.save(ended()).state

        assert self.run(what, on_failure="raise") == ["committed"] * 2

    def test_all_pause_and_go_on_together(self):
        def what(rank, mine):
            saves = Saves(FULL, FULL, FULL, None)
            mine.save(saves)
            return mine.save(saves).state, saves.begun

        assert self.run(what, on_failure="pause") == [("committed", 4)] * 2

    def test_one_that_failed_alone_is_not_left_alone(self):
        def what(rank, mine):
            saves = Saves(FULL, FULL if rank else None, None)
            mine.save(saves)
            return mine.save(saves).state, saves.begun

        assert self.run(what, on_failure="pause") == [("committed", 3)] * 2

    def test_without_policy_nobody_is_asked(self):
        def what(rank, mine):
            mine.save(ended(FULL))
            return mine.save(ended()).state if rank == 0 else None

        assert self.run(what) == ["committed", None]
