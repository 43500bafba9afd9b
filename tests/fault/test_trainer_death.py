"""What is sealed outlives the trainer; what is not leaves nothing behind."""

import pytest
from support.clients import assert_holds
from support.processes import stopped
from support.trainers import TrainerDied
from support.waiting import wait_until


def committed(save):
    return save["state"] == "committed"


def test_a_sealed_save_is_committed_though_its_trainer_was_killed(daemon, trainers, tmp_path):
    trainer = trainers.start()
    trainer.do("dcp.save(state(), checkpoint_id=path)", path=str(tmp_path / "before"))
    with stopped(*daemon.workers()):  # nothing can be written before the trainer is dead
        trainer.do("future = dcp.async_save(state(value=2.0), checkpoint_id=path)", path=str(tmp_path / "after"))
        trainer.do("future.staging_completion.result(10)")
        trainer.kill()
        assert not (tmp_path / "after").exists()
    daemon.wait_for_save(tmp_path / "after", committed)
    assert_holds(tmp_path / "after", value=2.0)


@pytest.mark.parametrize("times_saved_before", [0, 1])
def test_a_trainer_may_kill_itself_in_the_statement_after_staging(daemon, trainers, tmp_path, times_saved_before):
    trainer = trainers.start()
    if times_saved_before:
        trainer.do("dcp.save(state(), checkpoint_id=path)", path=str(tmp_path / "before"))
    trainer.start(
        "dcp.async_save(state(value=3.0), checkpoint_id=path).staging_completion.result()\n"
        "os.kill(os.getpid(), signal.SIGKILL)",
        path=str(tmp_path / "last"),
    )
    with pytest.raises(TrainerDied):
        trainer.finish()
    daemon.wait_for_save(tmp_path / "last", committed)
    assert_holds(tmp_path / "last", value=3.0)


def test_a_trainer_may_die_between_the_seal_and_the_message(daemon, trainers, tmp_path):
    trainer = trainers.start()
    trainer.do("session = dcp.connect()\ndcp.save(state(), checkpoint_id=path)", path=str(tmp_path / "before"))
    trainer.do("session._link.send_encoded = lambda body: os.kill(os.getpid(), signal.SIGKILL)")
    trainer.start("dcp.async_save(state(value=4.0), checkpoint_id=path)", path=str(tmp_path / "last"))
    with pytest.raises(TrainerDied):
        trainer.finish()
    daemon.wait_for_save(tmp_path / "last", committed)
    assert_holds(tmp_path / "last", value=4.0)


@pytest.mark.parametrize("options", ["", "staging='background'"])
def test_a_trainer_that_ends_without_waiting_loses_nothing(daemon, trainers, tmp_path, options):
    trainer = trainers.start()
    trainer.do(f"dcp.connect({options})\ndcp.save(state(), checkpoint_id=path)", path=str(tmp_path / "before"))
    [worker] = daemon.workers()
    with stopped(worker):
        trainer.do("dcp.async_save(state(value=6.0), checkpoint_id=path)", path=str(tmp_path / "last"))
        trainer.leave()
        assert not (tmp_path / "last").exists()
    daemon.wait_for_save(tmp_path / "last", committed)
    assert_holds(tmp_path / "last", value=6.0)


@pytest.mark.parametrize("planned_before", [False, True])
def test_a_trainer_killed_while_it_stages_leaves_nothing(daemon, trainers, tmp_path, planned_before):
    trainer = trainers.start()
    trainer.do("session = dcp.connect()")
    if planned_before:
        trainer.do("dcp.save(state(), checkpoint_id=path)", path=str(tmp_path / "before"))
    trainer.do("session._copier.copy = lambda pairs: threading.Event().wait()")
    trainer.start("dcp.async_save(state(value=5.0), checkpoint_id=path)", path=str(tmp_path / "never"))

    def slots():
        sessions = daemon.status()["jobs"][0]["sessions"]
        return [slot["state"] for session in sessions for slot in session["slots"]]

    wait_until(lambda: "staging" in slots(), "a slot that is being filled")
    trainer.kill()
    wait_until(lambda: not daemon.status()["jobs"][0]["sessions"], "the end of the session")
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == (["before"] if planned_before else [])
    if not planned_before:
        failed = daemon.wait_for_save(tmp_path / "never", lambda save: save["state"] == "failed")
        assert f"rank 0 (pid {trainer.pid})" in failed["error"]


def test_the_next_start_of_a_killed_job_saves(daemon, trainers, tmp_path):
    [first] = trainers.job(1, name="again")
    first.do("dcp.save(state(), checkpoint_id=path)", path=str(tmp_path / "a"))
    first.kill()
    [second] = trainers.job(1, name="again")
    assert second.get("session.incarnation") == 2
    second.do("dcp.save(state(value=2.0), checkpoint_id=path)", path=str(tmp_path / "a"))
    assert_holds(tmp_path / "a", value=2.0)


def test_a_silent_trainer_loses_its_session_and_learns_why(start_daemon, trainers, tmp_path):
    daemon = start_daemon(session_timeout_s=1.0)
    trainer = trainers.start()
    trainer.do("session = dcp.connect()\ndcp.save(state(), checkpoint_id=path)", path=str(tmp_path / "a"))
    with stopped(trainer.pid):
        wait_until(lambda: not daemon.status()["jobs"][0]["sessions"], "the end of the silent session")
    wait_until(lambda: not trainer.get("session.live"), "the trainer's notice")
    assert trainer.get("str(session._error)").startswith("the daemon heard nothing of this process")
    # It lives, and is alone in its job: the next save opens a new session.
    trainer.do("dcp.save(state(value=2.0), checkpoint_id=path)", path=str(tmp_path / "b"))
    assert_holds(tmp_path / "b", value=2.0)
