"""The daemon's side of retention: off the way of saves, one at a time for each folder, and no failure ends it."""

from __future__ import annotations

import asyncio
from contextlib import closing

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ckptd.daemon.job import jobs as daemon_job
from ckptd.daemon.job.crew import JobContext
from ckptd.daemon.job.retention import Retention
from ckptd.daemon.monitoring.metrics import Live, Metrics
from ckptd.daemon.recovery.job_log import JobLog
from ckptd.daemon.recovery.journal import Journal
from ckptd.daemon.settings.config import Config
from ckptd.protocol.errors import WorkerDied
from ckptd.protocol.retention_messages import Keep, RetainDone


class Pool:
    """A worker that does a task when it is told to."""

    def __init__(self):
        self.tasks, self.answers, self.closed = [], asyncio.Queue(), False

    async def run(self, task):
        self.tasks.append(task)
        answer = await self.answers.get()
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def close(self):
        self.closed = True


class Job:
    def __init__(self):
        self.pools, self.saving = [], []
        self.metrics = Metrics(lambda: Live({}, queue_depth=0, sessions=0, workers=0, arena_bytes=0))
        self.retention = Retention("job", open_pool=self.open, saving=lambda: self.saving, metrics=self.metrics)

    def open(self):
        self.pools.append(Pool())
        return self.pools[-1]

    def removed(self):
        families = {f.name: f for f in text_string_to_metric_families(self.metrics.render().decode())}
        return families["ckptd_removed_checkpoints"].samples[0].value


async def settle():
    for _ in range(10):
        await asyncio.sleep(0)


def test_a_worker_is_started_when_it_is_first_needed_and_told_what_is_being_saved():
    async def run():
        job = Job()
        job.saving = ["/runs/step-9", "/elsewhere/step-8"]
        assert job.pools == []
        job.retention.request("/runs", Keep(2))
        await settle()
        assert job.retention.busy
        [task] = job.pools[0].tasks
        assert (task.root, task.keep, task.busy) == ("/runs", Keep(2), ["step-9"])
        job.pools[0].answers.put_nowait(RetainDone(["step-1", "step-2"], [], []))
        await settle()
        assert not job.retention.busy
        assert job.removed() == 2
        assert job.retention.status()["last"]["removed"] == ["step-1", "step-2"]

    asyncio.run(run())


def test_what_is_asked_for_meanwhile_is_done_once_by_the_newest_policy():
    async def run():
        job = Job()
        for last in (1, 2, 3, 4):
            job.retention.request("/runs", Keep(last))
            await settle()
        pool = job.pools[0]
        assert [task.keep.last for task in pool.tasks] == [1]
        for _ in range(2):
            pool.answers.put_nowait(RetainDone([], [], []))
            await settle()
        assert [task.keep.last for task in pool.tasks] == [1, 4]
        assert not job.retention.busy
        assert len(job.pools) == 1

    asyncio.run(run())


@pytest.mark.parametrize("answer", [WorkerDied(1, -9, 3), RetainDone(["step-1"], [], ["unlink: no"])])
def test_a_failure_is_told_and_the_next_one_is_tried(answer, caplog):
    async def run():
        job = Job()
        job.retention.request("/runs", Keep(1))
        await settle()
        job.pools[0].answers.put_nowait(answer)
        await settle()
        assert job.retention.status()["last"]["errors"]
        assert "/runs" in caplog.text
        job.retention.request("/runs", Keep(1))
        await settle()
        assert len(job.pools[0].tasks) == 2
        job.pools[0].answers.put_nowait(RetainDone([], [], []))
        await settle()
        assert job.retention.status()["last"]["errors"] == []

    asyncio.run(run())


def test_a_job_that_removes_something_does_not_rest(tmp_path):
    async def run():
        metrics = Metrics(lambda: Live({}, queue_depth=0, sessions=0, workers=0, arena_bytes=0))
        with closing(Journal(str(tmp_path))) as journal:
            await watch(metrics, journal)

    async def watch(metrics, journal):
        context = JobContext(Config(), metrics, print, str(tmp_path), journal)
        job = daemon_job.Job("job", daemon_job.Owner(0, 0, None), context=context, log=JobLog(journal, 1))
        pool = Pool()
        job._new_pool = lambda count: pool
        assert job.resting
        job.retention.request("/runs", Keep(1))
        await settle()
        assert not job.resting
        assert job.idle
        pool.answers.put_nowait(RetainDone([], [], []))
        await settle()
        assert job.resting
        await job.close()
        assert pool.closed

    asyncio.run(run())


def test_closing_finishes_what_is_being_removed_and_begins_nothing_new():
    async def run():
        job = Job()
        job.retention.request("/runs", Keep(1))
        await settle()
        job.retention.request("/runs", Keep(1))
        closing = asyncio.create_task(job.retention.close())
        await settle()
        assert not closing.done()
        job.pools[0].answers.put_nowait(RetainDone([], [], []))
        await closing
        assert job.pools[0].closed
        assert len(job.pools[0].tasks) == 1
        await job.retention.close()

    asyncio.run(run())
