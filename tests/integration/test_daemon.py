"""The daemon as a process: small, quick to start, and open about what it does."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
from support.clients import assert_holds
from support.nursery import state
from support.processes import stopped
from support.waiting import wait_until

from ckptd import __version__

CKPTD = str(Path(sys.executable).with_name("ckptd"))
MIB = 1 << 20


def mapped(pid, library):
    return [line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if library in line]


def test_the_daemon_starts_quickly_and_stays_small(start_daemon, client, tmp_path, record_property):
    begun = time.monotonic()
    daemon = start_daemon()
    ready_s = time.monotonic() - begun
    assert daemon.get("/readyz") == (200, "ready\n")
    client.save(state(8), checkpoint_id=tmp_path / "a")
    rss = psutil.Process(daemon.pid).memory_info().rss
    record_property("ready_s", round(ready_s, 3))
    record_property("rss_mib", rss // MIB)
    print(f"ready in {ready_s:.2f} s, {rss // MIB} MiB resident")
    assert ready_s < 5
    assert rss < 60 * MIB
    for library in ("libtorch", "numpy", ".arena"):
        assert not mapped(daemon.pid, library)


def test_workers_load_no_torch_see_no_gpu_and_step_back(start_daemon, client, tmp_path):
    daemon = start_daemon(worker_nice=7)
    client.save(state(8), checkpoint_id=tmp_path / "a")
    [worker] = daemon.workers()
    assert not mapped(worker, "libtorch")
    assert mapped(worker, ".arena")
    assert psutil.Process(worker).environ()["CUDA_VISIBLE_DEVICES"] == ""
    assert psutil.Process(worker).nice() == min(psutil.Process(daemon.pid).nice() + 7, 19)
    assert psutil.Process(worker).ppid() == daemon.pid


def test_every_page_answers(daemon, client, tmp_path):
    client.save(state(), checkpoint_id=tmp_path / "a")
    assert daemon.get("/healthz") == (200, "ok\n")
    assert daemon.get("/readyz") == (200, "ready\n")
    assert str(tmp_path / "a") in daemon.get("/")[1]
    assert daemon.get("/no/such/page")[0] == 404
    assert daemon.metric('ckptd_saves_total{outcome="committed"}') == 1
    assert daemon.metric("ckptd_sessions") == 1
    assert daemon.metric("ckptd_staged_bytes_total") == daemon.metric("ckptd_written_bytes_total") > MIB
    assert daemon.metric("ckptd_save_seconds_count") == 1


def test_status_tells_of_a_save_under_way_done_and_failed(daemon, client, tmp_path):
    client.save(state(), checkpoint_id=tmp_path / "done")
    (tmp_path / "file").touch()
    client.async_save(state(), checkpoint_id=tmp_path / "file" / "failed").exception(30)
    wait_until(lambda: daemon.metric('ckptd_slots{state="free"}') == 2, "the end of the failed save's cleaning up")
    with stopped(*daemon.workers()):
        future = client.async_save(state(), checkpoint_id=tmp_path / "under way")
        daemon.wait_for_save(tmp_path / "under way", lambda save: save["state"] == "staged")
        answer = subprocess.run(
            [CKPTD, "status", "--json"],
            env={**os.environ, **daemon.runtime.environment},
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        status = json.loads(answer.stdout)
        [slot] = [s for s in status["jobs"][0]["sessions"][0]["slots"] if s["state"] != "free"]
        assert slot["state"] == "persisting"
    future.result(30)
    assert status["pid"] == daemon.pid
    assert status["version"] == __version__
    assert status["http"] == Path(daemon.runtime.path, "http").read_text().strip()
    assert status["workers"] == daemon.workers()
    [job] = status["jobs"]
    done, failed, under_way = job["generations"]
    assert (done["checkpoint_id"], done["state"], done["error"]) == (str(tmp_path / "done"), "committed", None)
    assert done["bytes_done"] == done["bytes_total"] > MIB
    assert failed["state"] == "failed"
    assert "file" in failed["error"]
    assert under_way["state"] == "staged"
    assert under_way["bytes_done"] == 0 < under_way["bytes_total"]
    human = subprocess.run(
        [CKPTD, "status"],
        env={**os.environ, **daemon.runtime.environment, "COLUMNS": "250"},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert "committed" in human.stdout
    assert str(daemon.pid) in human.stdout


def test_status_without_a_daemon_fails_with_the_place(runtime):
    answer = subprocess.run(
        [CKPTD, "status"],
        env={**os.environ, **runtime.environment},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert answer.returncode == 1
    assert runtime.path in answer.stderr
    assert "ckptd serve" in answer.stderr


def test_jobs_of_several_trainers_live_side_by_side(daemon, trainers, tmp_path):
    several = [trainers.start() for _ in range(3)]
    for number, trainer in enumerate(several):
        trainer.start(
            "dcp.save(state(value=value), checkpoint_id=path)", value=float(number), path=str(tmp_path / str(number))
        )
    for trainer in several:
        trainer.finish()
    assert len(daemon.status()["jobs"]) == 3
    for number in range(3):
        assert_holds(tmp_path / str(number), value=float(number))


def test_a_forked_child_does_not_speak_for_its_parent(daemon, trainers, tmp_path):
    trainer = trainers.start()
    trainer.do("session = dcp.connect()\ndcp.save(state(), checkpoint_id=path)", path=str(tmp_path / "a"))
    trainer.do("import sys\npid = os.fork()\nif pid == 0:\n    os._exit(0)\nos.waitpid(pid, 0)")
    trainer.do("dcp.save(state(value=2.0), checkpoint_id=path)", path=str(tmp_path / "a"))
    assert trainer.get("session.live")
    assert_holds(tmp_path / "a", value=2.0)


def test_a_child_that_holds_the_connection_does_not_keep_a_dead_trainers_session(daemon, trainers, tmp_path):
    trainer = trainers.start()
    trainer.do("session = dcp.connect()")
    trainer.do("pid = os.fork()\nif pid == 0:\n    signal.pause()\n    os._exit(0)")
    child = trainer.get("pid")
    try:
        trainer.kill()
        wait_until(lambda: daemon.status()["jobs"][0]["sessions"] == [], "the end of the dead trainer's session")
    finally:
        os.kill(child, 9)
