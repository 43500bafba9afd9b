"""A daemon that is gone for a while costs saves, and training only where that was asked for."""

import pytest
from support.clients import assert_holds
from support.trainers import TrainerRaised
from support.waiting import wait_until


def begin(trainer, root, on_failure):
    trainer.do(
        "manager = dcp.CheckpointManager(root, dcp.ManagerOptions(on_failure=on_failure, pause_timeout_s=60))\n"
        "manager.save(1, state()).result(30)\n"
        "step = 1",
        root=str(root),
        on_failure=on_failure,
    )


def next_save_fails(trainer):
    """Save until the trainer has noticed that the daemon is gone; return what became of the last save."""

    def failed():
        trainer.do("step += 1\nlast = outcome(manager.save(step, state(1, step)))")
        return trainer.get("last") != "committed" and trainer.get("last")

    return wait_until(failed, "a save that fails")


def test_training_goes_on_without_a_daemon_and_saves_again_with_the_next(start_daemon, trainers, tmp_path):
    daemon, trainer = start_daemon(), trainers.start()
    begin(trainer, tmp_path / "run", "continue")
    daemon.kill()
    assert next_save_fails(trainer).startswith("Daemon")
    assert next_save_fails(trainer).startswith("Daemon")
    assert trainer.get("manager.failures.in_a_row") >= 2
    start_daemon()
    trainer.do("step += 1\nmanager.save(step, state(1, step)).result(30)")
    step = trainer.get("step")
    assert trainer.get("(manager.failures.in_a_row, manager.latest().step)") == (0, step)
    assert_holds(tmp_path / "run" / f"step-{step}", value=float(step))


def test_training_pauses_until_there_is_a_daemon_again(start_daemon, trainers, tmp_path):
    daemon, trainer = start_daemon(), trainers.start()
    begin(trainer, tmp_path / "run", "pause")
    daemon.kill()
    trainer.do("step += 1\nlast = outcome(manager.save(step, state(1, step)))")
    assert trainer.get("last").startswith("Daemon")
    trainer.start("step += 1\nmanager.save(step, state(1, step)).result(30)")
    start_daemon()
    trainer.finish()
    assert_holds(tmp_path / "run" / "step-3", value=3.0)


def test_it_ends_where_that_was_asked_for(start_daemon, trainers, tmp_path):
    daemon, trainer = start_daemon(), trainers.start()
    begin(trainer, tmp_path / "run", "raise")
    daemon.kill()
    with pytest.raises(TrainerRaised, match="Daemon"):
        trainer.do("for step in (2, 3): outcome(manager.save(step, state(1, step)))")
