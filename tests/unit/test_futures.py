"""What a save tells its caller."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading

import pytest

from ckptd.client.failures import as_failure
from ckptd.client.saving.futures import SaveFuture, SaveProgress, wait_quietly
from ckptd.protocol.errors import BadIndex, DaemonLost, DiskFull

ERROR = as_failure(DiskFull("/runs", 10, 3))


class Reader:
    """Stands for the metadata on the disk; counts how often it is read."""

    def __init__(self, *results: object) -> None:
        self.results, self.calls = list(results) or [{"the": "metadata"}], 0

    def __call__(self):
        self.calls += 1
        result = self.results.pop(0) if len(self.results) > 1 else self.results[0]
        if isinstance(result, Exception):
            raise result
        return result


@pytest.fixture
def reader():
    return Reader()


@pytest.fixture
def future(reader):
    return SaveFuture("/runs/7", reader)


def test_a_new_save_is_scheduled(future):
    assert (future.state, future.progress) == ("scheduled", SaveProgress(0, 0))
    assert future.running()
    assert not future.cancel()
    assert not future.staging_completion.done()
    assert future.upload_completion is future
    assert (future.checkpoint_id, future.stall_s) == ("/runs/7", 0.0)


def test_it_goes_from_scheduled_to_staged_to_committed(future):
    future.note_staged(100)
    assert (future.state, future.progress) == ("staged", SaveProgress(0, 100))
    assert future.staging_completion.result(0) is None
    assert not future.done()
    future.note_progress(40, 100)
    assert (future.state, future.progress) == ("staged", SaveProgress(40, 100))
    future.note_committed()
    assert (future.state, future.progress) == ("committed", SaveProgress(100, 100))
    assert future.exception() is None


def test_a_failure_before_staging_fails_both_futures(future):
    future.note_failed(ERROR)
    assert future.state == "failed"
    assert future.exception() is future.staging_completion.exception() is ERROR
    with pytest.raises(DiskFull):
        future.result()


def test_a_failure_after_staging_leaves_the_staging_done(future):
    future.note_staged(100)
    future.note_failed(ERROR)
    assert (future.state, future.exception()) == ("failed", ERROR)
    assert future.staging_completion.exception() is None


def test_a_staging_that_failed_is_not_staged(future):
    future.staging_completion.set_exception(ERROR)
    assert future.state == "scheduled"


def test_the_end_is_told_once(future):
    future.note_failed(ERROR)
    future.note_failed(DaemonLost("/run"))
    future.note_committed()
    future.note_staged(100)
    assert (future.state, future.exception(), future.progress) == ("failed", ERROR, SaveProgress(0, 0))


def test_a_commit_is_not_undone(future):
    future.note_staged(100)
    future.note_committed()
    future.note_failed(ERROR)
    assert future.state == "committed"


def test_two_threads_that_find_it_failed_at_once_do_not_meet(future, monkeypatch):
    future.note_failed(ERROR)
    for unaware in (future, future.staging_completion):  # as if the other thread had come in after the look
        monkeypatch.setattr(unaware, "done", lambda: False)
    future.note_failed(DaemonLost("/run"))
    future.note_committed()
    future.note_staged(1)
    assert future.exception() is ERROR


class TestTheResult:
    def test_metadata_are_read_when_they_are_asked_for_and_once(self, future, reader):
        future.note_staged(1)
        future.note_committed()
        assert future.exception() is None
        assert reader.calls == 0
        first = future.result()
        assert first == {"the": "metadata"}
        assert future.result(timeout=1) is first
        assert reader.calls == 1

    def test_several_threads_build_it_once(self, future, reader):
        future.note_committed()
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda _: future.result(), range(8)))
        assert reader.calls == 1
        assert all(result is results[0] for result in results)

    def test_metadata_that_cannot_be_read_fail_the_call_and_not_the_save(self):
        future = SaveFuture("/runs/7", Reader(BadIndex("/runs/7", "it was overwritten"), {"the": "metadata"}))
        future.note_committed()
        with pytest.raises(BadIndex):
            future.result()
        assert (future.state, future.exception()) == ("committed", None)
        assert future.result() == {"the": "metadata"}

    def test_a_save_under_way_has_none_yet(self, future, reader):
        with pytest.raises(TimeoutError):
            future.result(timeout=0)
        assert reader.calls == 0


class TestTheStandardLibrary:
    def test_wait_and_as_completed_take_it(self, future):
        other = SaveFuture("/runs/8", Reader())
        other.note_failed(ERROR)
        done, pending = concurrent.futures.wait([future, other], timeout=0)
        assert (done, pending) == ({other}, {future})
        future.note_committed()
        assert set(concurrent.futures.as_completed([future, other])) == {future, other}

    def test_callbacks_are_called(self, future):
        seen = []
        future.add_done_callback(lambda done: seen.append(done.state))
        future.note_committed()
        assert seen == ["committed"]

    def test_a_coroutine_can_await_it(self, future):
        async def save():
            waiting = asyncio.ensure_future(asyncio.wrap_future(future))
            thread = threading.Thread(target=future.note_committed)
            thread.start()
            result = await waiting
            thread.join()
            return result

        assert asyncio.run(save()) == {"the": "metadata"}

    def test_a_coroutine_hears_of_a_failure(self, future):
        async def save():
            threading.Thread(target=future.note_failed, args=[ERROR]).start()
            await asyncio.wrap_future(future)

        with pytest.raises(DiskFull):
            asyncio.run(save())


class TestWaitingQuietly:
    @pytest.mark.parametrize("outcome", ["result", "error"])
    def test_any_outcome_ends_it(self, outcome):
        future: concurrent.futures.Future[None] = concurrent.futures.Future()
        future.set_result(None) if outcome == "result" else future.set_exception(ERROR)
        wait_quietly(future, timeout_s=10)

    def test_it_waits_for_another_thread(self):
        future: concurrent.futures.Future[None] = concurrent.futures.Future()
        thread = threading.Thread(target=future.set_exception, args=[ERROR])
        thread.start()
        wait_quietly(future, timeout_s=10)
        thread.join()

    def test_it_does_not_wait_for_ever(self):
        with pytest.raises(TimeoutError, match="not done after"):
            wait_quietly(concurrent.futures.Future(), timeout_s=0.001)
