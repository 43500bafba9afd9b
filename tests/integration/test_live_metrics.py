"""The metrics that mirror what is live, of a real daemon with real workers and a real disk."""

import os

import psutil
import pytest
from support.nursery import outcome, state
from support.processes import kill, stopped
from support.waiting import wait_until


def test_a_save_under_way_is_seen_in_every_gauge(daemon, client, tmp_path):
    client.connect(state(), slots=1)
    assert daemon.metric("ckptd_full_sessions") == 0
    with stopped(*daemon.workers()):
        future = client.async_save(state(), checkpoint_id=tmp_path / "a")
        daemon.wait_for_save(tmp_path / "a", lambda save: save["state"] == "staged")
        assert daemon.metric("ckptd_saves_in_progress") == 1
        assert daemon.metric("ckptd_full_sessions") == 1
        assert daemon.metric('ckptd_slots{state="persisting"}') == 1
    assert outcome(future) == "committed"
    wait_until(lambda: daemon.metric("ckptd_full_sessions") == 0, "the slot's end")
    assert daemon.metric("ckptd_saves_in_progress") == 0


def test_lateness_is_told_while_a_job_with_a_rhythm_is_connected(daemon, trainers, tmp_path):
    trainer = trainers.start()
    for number in range(3):
        trainer.do("dcp.save(state(), checkpoint_id=path)", path=str(tmp_path / str(number)))
    [job] = daemon.status()["jobs"]
    assert job["interval_s"] > 0
    first = daemon.metric("ckptd_commit_lateness_ratio")
    wait_until(lambda: daemon.metric("ckptd_commit_lateness_ratio") > first + 1, "an interval without a commit")
    trainer.leave()
    with pytest.raises(StopIteration):  # over is not late
        wait_until(lambda: daemon.metric("ckptd_commit_lateness_ratio") < 0, "its end")


def test_what_processes_use_is_what_the_system_says(daemon, client, tmp_path):
    client.save(state(64), checkpoint_id=tmp_path / "a")
    [worker] = daemon.workers()
    memory = psutil.Process(worker).memory_info()
    private = daemon.metric('ckptd_resident_bytes{kind="private",role="worker"}')
    assert abs(private - (memory.rss - memory.shared)) < 16 << 20
    assert daemon.metric('ckptd_resident_bytes{kind="shared",role="worker"}') > 64 << 20  # it maps the arena
    assert daemon.metric('ckptd_resident_bytes{kind="private",role="daemon"}') < 60 << 20
    assert daemon.metric('ckptd_open_descriptors{role="daemon"}') >= psutil.Process(daemon.pid).num_fds() - 4
    used = daemon.metric('ckptd_cpu_seconds_total{role="worker"}')
    assert used > 0
    kill(worker)
    wait_until(lambda: daemon.metric("ckptd_workers") == 0, "that its end is noticed")
    assert daemon.metric('ckptd_cpu_seconds_total{role="worker"}') >= used


def test_the_room_on_volumes_is_that_of_the_checkpoints_disk(daemon, client, tmp_path):
    client.save(state(), checkpoint_id=tmp_path / "a")
    wait_until(lambda: "checkpoints" in daemon.status()["volumes"], "a look at the disk")
    volume = os.statvfs(tmp_path)
    assert daemon.metric('ckptd_volume_size_bytes{volume="checkpoints"}') == volume.f_blocks * volume.f_frsize
    assert daemon.metric('ckptd_volume_free_bytes{volume="shm"}') > 0
    assert daemon.metric("ckptd_last_commit_bytes") > 1 << 20


def test_status_tells_of_phases_rate_and_the_slowest_rank(daemon, trainers, tmp_path):
    job = trainers.job(2)
    job.do("dcp.save(state(value=rank), checkpoint_id=path)", path=str(tmp_path / "a"))
    [save] = daemon.generations()
    assert {phase["phase"] for phase in save["phases"]} == {"plan", "stage", "queue", "write", "fsync", "commit"}
    assert all(phase["begin_s"] >= 0 and phase["seconds"] >= 0 for phase in save["phases"])
    assert save["bytes_per_s"] > 0
    assert save["slowest_rank"]["rank"] in {0, 1}
    assert (save["ranks_written"], save["world_size"], save["waiting_for"]) == (2, 2, None)
