"""What may pass is tried again, for a while; what will not is told at once."""

from __future__ import annotations

import asyncio
import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.daemon.settings.config import Config
from ckptd.daemon.workers import retries
from ckptd.daemon.workers.retries import Retrying
from ckptd.protocol.errors import BadIndex, DiskFull, RankFailed, SystemCallFailed, WorkerDied
from ckptd.protocol.messages import DiscardDone, DiscardTask
from ckptd.protocol.transient import TRANSIENT_ERRNOS, Backoff, is_transient

TASK = DiscardTask("/dir")


@pytest.mark.parametrize("name", ["EIO", "EAGAIN", "ETIMEDOUT", "ESTALE", "EINTR", "ECONNRESET", "ENOMEM"])
def test_errors_of_the_moment_are_transient(name):
    assert is_transient(SystemCallFailed("pwrite", "/x", getattr(errno, name)))


@pytest.mark.parametrize(
    "name", ["ENOSPC", "EDQUOT", "EACCES", "EPERM", "EROFS", "ENOENT", "EEXIST", "EFBIG", "EINVAL", "EBADF", "ENOTDIR"]
)
def test_errors_of_the_place_are_not(name):
    assert not is_transient(SystemCallFailed("pwrite", "/x", getattr(errno, name)))


@pytest.mark.parametrize(
    "error",
    [DiskFull("/x", 2, 1), WorkerDied(1, -9, 3), BadIndex("/x", "?"), RankFailed(0, "system_call_failed", "EIO")],
)
def test_neither_is_anything_else(error):
    assert not is_transient(error)


def test_each_has_its_reason():
    assert all(TRANSIENT_ERRNOS.values())


@given(st.builds(Backoff, st.integers(1, 100), st.floats(0.001, 5), st.floats(5, 60)))
def test_waits_grow_are_bounded_and_end(backoff):
    waits = [backoff.wait_s(attempt) for attempt in range(1, backoff.attempts + 1)]
    assert waits.pop() is None
    assert waits == sorted(waits)
    assert all(backoff.first_s <= wait <= backoff.most_s for wait in waits)
    assert waits[:1] == [backoff.first_s][: len(waits)]


def test_the_default_outlasts_a_hiccup_but_not_the_deadline_of_a_save():
    backoff = Config().write_backoff
    total_s = sum(backoff.wait_s(attempt) for attempt in range(1, backoff.attempts))
    assert 5 <= total_s < Config().progress_timeout_s / 4


class Pool:
    """Fails as it is told to, then succeeds."""

    def __init__(self, *errors):
        self.errors, self.tasks = list(errors), []

    async def run(self, task, *, on_progress, on_start):
        self.tasks.append(task)
        on_start(0.0)
        on_progress(7)
        if self.errors:
            raise self.errors.pop(0)
        return DiscardDone()


def run(pool, monkeypatch, attempts=3):
    """Return how it ended, what was waited, told and counted."""
    waits, progress, counted = [], [], []

    async def sleep(seconds):
        waits.append(seconds)

    monkeypatch.setattr(retries.asyncio, "sleep", sleep)
    again = Retrying(lambda: pool, backoff=Backoff(attempts, 0.5), on_retry=lambda: counted.append(1))

    async def main():
        try:
            return await again.run(TASK, on_progress=progress.append, on_start=lambda _: None)
        except Exception as error:  # noqa: BLE001  # the test looks at it
            return error

    return asyncio.run(main()), waits, progress, len(counted)


EIO = SystemCallFailed("pwrite", "/x", errno.EIO)


def test_what_passes_is_done_again_and_progress_begins_anew(monkeypatch):
    pool = Pool(EIO, EIO)
    assert run(pool, monkeypatch) == (DiscardDone(), [0.5, 1.0], [7, 0, 7, 0, 7], 2)
    assert pool.tasks == [TASK] * 3


def test_what_does_not_pass_in_time_is_raised_as_it_is(monkeypatch):
    error, waits, _, counted = run(Pool(EIO, EIO, EIO, EIO), monkeypatch)
    assert error is EIO
    assert (waits, counted) == ([0.5, 1.0], 2)


def test_what_will_not_pass_is_raised_at_once(monkeypatch):
    full = SystemCallFailed("pwrite", "/x", errno.ENOSPC)
    assert run(Pool(full), monkeypatch) == (full, [], [7], 0)
