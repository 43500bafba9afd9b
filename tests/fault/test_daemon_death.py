"""The daemon may be stopped, killed or hang, with or without a successor: no wait is without end, and nothing is mixed.

What a successor takes up is in test_adoption.py.
"""

import os
import signal

import pytest
from support.clients import assert_holds
from support.processes import stopped, wait_gone
from support.trainers import TrainerRaised
from support.waiting import wait_until


def test_sigterm_lets_a_sealed_save_finish(daemon, trainers, tmp_path):
    trainer = trainers.start()
    trainer.do("dcp.save(state(), checkpoint_id=path)", path=str(tmp_path / "before"))
    with stopped(*daemon.workers()):
        trainer.do("future = dcp.async_save(state(value=2.0), checkpoint_id=path)", path=str(tmp_path / "last"))
        daemon.wait_for_save(tmp_path / "last", lambda save: save["state"] == "staged")
        daemon.signal(signal.SIGTERM)
        wait_until(lambda: daemon.get("/readyz")[0] == 503, "the daemon's refusal of new work")
        assert daemon.get("/healthz")[0] == 200
    daemon.runtime.sessions_wait = True
    assert daemon.wait() == 0
    assert_holds(tmp_path / "last", value=2.0)
    assert trainer.get("outcome(future)") == "committed"


def test_a_stopping_daemon_fails_what_is_not_sealed_and_takes_nothing_new(daemon, trainers, tmp_path):
    ranks = trainers.job(2)
    ranks.do("dcp.save(state(), checkpoint_id=path)", path=str(tmp_path / "before"))
    with stopped(*daemon.workers(2)):
        ranks.do("one = dcp.async_save(state(value=2.0), checkpoint_id=path)", path=str(tmp_path / "whole"))
        ranks[0].do("two = dcp.async_save(state(), checkpoint_id=path)", path=str(tmp_path / "half"))
        daemon.wait_for_save(tmp_path / "half", lambda save: save["ranks_sealed"] == 1)
        daemon.signal(signal.SIGTERM)
        assert ranks[0].get("outcome(two)").startswith("ShuttingDown")
        late = trainers.start()
        with pytest.raises(TrainerRaised) as caught:
            late.do("dcp.connect()")
        assert caught.value.kind in {"ShuttingDown", "DaemonUnavailable"}
    daemon.runtime.sessions_wait = True
    assert daemon.wait() == 0
    assert ranks.get("outcome(one)") == ["committed"] * 2
    assert not (tmp_path / "half").exists()
    assert_holds(tmp_path / "whole", value=2.0)


def test_a_trainer_hears_of_a_daemon_that_no_other_follows_and_saves_with_a_new_one(runtime, trainers, tmp_path):
    trainer = trainers.start(CKPTD_EMBEDDED="1", CKPTD_CONFIG=runtime.configure())
    path = str(tmp_path / "a")
    trainer.do("session = dcp.connect(reconnect_timeout_s=0.5)\ndcp.save(state(), checkpoint_id=path)", path=path)
    first = trainer.get("session.daemon_pid")
    runtime.daemon_was_killed = True
    trainer.do("os.environ['CKPTD_EMBEDDED'] = '0'")
    os.kill(first, signal.SIGKILL)
    wait_gone(first)
    trainer.do("future = dcp.async_save(state(value=2.0), checkpoint_id=path)", path=path)
    error = trainer.get("outcome(future)")
    assert error.startswith("DaemonLost")
    assert runtime.path in error
    trainer.do("os.environ['CKPTD_EMBEDDED'] = '1'")
    trainer.do("future = dcp.async_save(state(value=3.0), checkpoint_id=path)", path=path)
    assert trainer.get("outcome(future)") == "committed"
    assert_holds(tmp_path / "a", value=3.0)
    assert trainer.get("next(iter(dcp.session.sessions._sessions.values())).daemon_pid") != first


@pytest.mark.parametrize("waiting_for", ["a plan", "a slot", "an arena"])
def test_no_call_waits_for_a_killed_daemon_that_no_other_follows(daemon, trainers, tmp_path, waiting_for):
    trainer = trainers.start()
    trainer.do("session = dcp.connect(slots=1, reconnect_timeout_s=0.5)")
    if waiting_for == "a slot":
        trainer.do("dcp.save(state(), checkpoint_id=path)", path=str(tmp_path / "before"))
    [worker] = daemon.workers()
    with stopped(worker):
        if waiting_for == "a slot":
            trainer.do("first = dcp.async_save(state(), checkpoint_id=path)", path=str(tmp_path / "first"))
            trainer.start("future = dcp.async_save(state(), checkpoint_id=path)", path=str(tmp_path / "a"))
        elif waiting_for == "a plan":
            trainer.start("future = dcp.async_save(state(), checkpoint_id=path)", path=str(tmp_path / "a"))
            daemon.wait_for_save(tmp_path / "a", lambda save: save["state"] == "scheduled")
        else:
            os.kill(daemon.pid, signal.SIGSTOP)
            trainer.start("session._link.open_arena(slots=1, slot_bytes=1 << 20)")
        daemon.kill()
        if waiting_for == "an arena":
            with pytest.raises(TrainerRaised, match="DaemonUnavailable"):
                trainer.finish()
        else:
            trainer.finish()
            assert trainer.get("outcome(future)").startswith("DaemonLost")


def test_a_daemon_that_hangs_is_given_up(start_daemon, trainers, tmp_path):
    daemon = start_daemon(session_timeout_s=1.0)
    trainer = trainers.start()
    trainer.do("dcp.connect(reconnect_timeout_s=1.0)\ndcp.save(state(), checkpoint_id=path)", path=str(tmp_path / "a"))
    with stopped(daemon.pid):
        trainer.do("future = dcp.async_save(state(), checkpoint_id=path)", path=str(tmp_path / "b"))
        assert trainer.get("outcome(future)").startswith("DaemonLost")
        assert trainer.get("future.staging_completion.done()")


def test_a_daemon_that_hangs_for_a_while_goes_on_with_its_sessions(start_daemon, trainers, tmp_path):
    daemon = start_daemon(session_timeout_s=1.0)
    trainer = trainers.start()
    trainer.do("session = dcp.connect()\ndcp.save(state(), checkpoint_id=path)", path=str(tmp_path / "a"))
    with stopped(daemon.pid):
        trainer.do("future = dcp.async_save(state(value=2.0), checkpoint_id=path)", path=str(tmp_path / "b"))
        wait_until(lambda: trainer.get("session._link.resuming"), "the trainer's notice")
    assert trainer.get("outcome(future)") == "committed"
    assert_holds(tmp_path / "b", value=2.0)


def test_a_bug_in_the_line_to_the_daemon_leaves_nobody_waiting(daemon, trainers, tmp_path):
    trainer = trainers.start()
    trainer.do("session = dcp.connect()\ndcp.save(state(), checkpoint_id=path)", path=str(tmp_path / "a"))
    trainer.do("session._link._on_message = lambda message: 1 / 0")
    trainer.do("future = dcp.async_save(state(), checkpoint_id=path)", path=str(tmp_path / "b"))
    assert "ZeroDivisionError" in trainer.get("outcome(future)")
    trainer.do("dcp.save(state(value=2.0), checkpoint_id=path)", path=str(tmp_path / "c"))
    assert_holds(tmp_path / "c", value=2.0)


def test_the_next_daemon_clears_what_a_killed_one_left_of_dead_trainers(start_daemon, trainers, tmp_path):
    daemon = start_daemon()
    trainer = trainers.start()
    trainer.do("dcp.save(state(), checkpoint_id=path)", path=str(tmp_path / "a"))
    [worker] = daemon.workers()
    left = set(daemon.runtime.arenas.iterdir())
    daemon.kill()
    trainer.kill()
    wait_gone(worker)
    assert left
    start_daemon()
    wait_until(lambda: not left & set(daemon.runtime.arenas.iterdir()), "the removal of what was left")
    late = trainers.start()
    late.do("dcp.save(state(value=2.0), checkpoint_id=path)", path=str(tmp_path / "a"))
    assert_holds(tmp_path / "a", value=2.0)
    daemon.runtime.daemon_was_killed = False  # from here on nothing may be left


def test_a_second_daemon_in_the_same_place_refuses_to_start(daemon):
    import subprocess
    import sys

    second = subprocess.run(
        [sys.executable, "-m", "ckptd.daemon", "--mode", "user", "--http", "127.0.0.1:0"],
        env={**os.environ, **daemon.runtime.environment},
        capture_output=True,
        text=True,
        timeout=20,
        cwd="/",
        check=False,
    )
    assert second.returncode == 1
    assert daemon.runtime.path in second.stderr
    assert len(second.stderr.strip().splitlines()) == 1
    assert daemon.get("/readyz")[0] == 200
