"""A worker that dies is replaced and its work done again: the sealed slot is still there."""

import os
import signal

import pytest
from support.clients import assert_holds, stock_save
from support.nursery import state
from support.processes import stopped, wait_gone
from support.sabotage import sabotage
from support.waiting import wait_until

MIB = 48


def test_a_worker_killed_in_the_middle_of_a_write_is_replaced(start_daemon, trainers, tmp_path):
    daemon = start_daemon(write_chunk_bytes=4096, write_threads=1)
    trainer = trainers.start()
    trainer.do(f"future = dcp.async_save(state({MIB}), checkpoint_id=path)", path=str(tmp_path / "a"))
    daemon.wait_for_save(tmp_path / "a", lambda save: save["bytes_done"] > 0)
    [worker] = daemon.workers()
    with stopped(worker):
        [save] = daemon.generations()
        assert 0 < save["bytes_done"] < save["bytes_total"]
        os.kill(worker, signal.SIGKILL)
        wait_gone(worker)
    assert trainer.get("outcome(future)") == "committed"
    assert daemon.metric("ckptd_worker_restarts_total") == 1
    assert_holds(tmp_path / "a", mib=MIB)


def test_a_worker_killed_before_it_took_the_task_is_replaced(daemon, trainers, tmp_path):
    trainer = trainers.start()
    trainer.do("session = dcp.connect()")
    [worker] = daemon.workers()
    with stopped(worker):
        trainer.start("future = dcp.async_save(state(), checkpoint_id=path)", path=str(tmp_path / "a"))
        daemon.wait_for_save(tmp_path / "a", lambda save: save["state"] == "scheduled")  # it plans
        os.kill(worker, signal.SIGKILL)
        wait_gone(worker)
    trainer.finish()
    assert trainer.get("outcome(future)") == "committed"
    assert_holds(tmp_path / "a")


@pytest.mark.parametrize(
    ("moment", "over"),
    [
        ("before_publish", None),
        ("after_publish", None),
        ("before_publish", "checkpoint"),
        ("after_exchange", "checkpoint"),
        ("after_exchange", "folder"),
        ("after_publish", "checkpoint"),
    ],
)
def test_a_worker_that_dies_around_the_rename_does_no_harm(start_daemon, trainers, tmp_path, moment, over):
    target = tmp_path / "a"
    trainer = trainers.start()
    if over is not None:
        target.mkdir()
        (target / "notes.txt").write_text("mine")
    if over == "checkpoint":
        stock_save(state(value=1.0), target)
    daemon = start_daemon(environment=sabotage(tmp_path, moment, times=1))
    trainer.do("future = dcp.async_save(state(value=2.0), checkpoint_id=path)", path=str(target))
    assert trainer.get("outcome(future)") == "committed"
    assert daemon.metric("ckptd_worker_restarts_total") == 1
    assert_holds(target, value=2.0)
    foreign = [] if over is None else ["notes.txt"]
    assert sorted(path.name for path in target.iterdir()) == [".ckptd", ".metadata", "__0_0.distcp", *foreign]


def test_a_save_whose_workers_keep_dying_fails_and_the_next_one_works(start_daemon, trainers, tmp_path):
    daemon = start_daemon(work_attempts=2, environment=sabotage(tmp_path, "before_write", times=2))
    trainer = trainers.start()
    trainer.do("future = dcp.async_save(state(), checkpoint_id=path)", path=str(tmp_path / "a"))
    error = trainer.get("outcome(future)")
    assert "worker pid" in error
    assert "attempt 2" in error
    assert not (tmp_path / "a").exists()
    trainer.do("dcp.save(state(value=2.0), checkpoint_id=path)", path=str(tmp_path / "a"))
    assert daemon.metric("ckptd_worker_restarts_total") == 2
    assert_holds(tmp_path / "a", value=2.0)


def test_a_worker_that_says_nothing_for_too_long_is_killed_and_the_save_fails(daemon, trainers, tmp_path):
    trainer = trainers.start()
    trainer.do("dcp.connect(progress_timeout_s=2.0)")
    trainer.do("dcp.save(state(), checkpoint_id=path)", path=str(tmp_path / "a"))
    [worker] = daemon.workers()
    with stopped(worker):
        trainer.do("future = dcp.async_save(state(), checkpoint_id=path)", path=str(tmp_path / "b"))
        assert "nothing happened for" in trainer.get("outcome(future)")
        wait_gone(worker)
    trainer.do("dcp.save(state(value=2.0), checkpoint_id=path)", path=str(tmp_path / "b"))
    assert_holds(tmp_path / "b", value=2.0)


def test_workers_go_when_the_job_has_gone(daemon, trainers, tmp_path):
    trainer = trainers.start()
    trainer.do("dcp.save(state(), checkpoint_id=path)", path=str(tmp_path / "a"))
    [worker] = daemon.workers()
    trainer.leave()
    wait_gone(worker)
    wait_until(lambda: list(daemon.runtime.arenas.iterdir()) == [], "the removal of the job's arenas")
