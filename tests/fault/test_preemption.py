"""A preempted job saves at its next step boundary, hands over and leaves; the daemon finishes what it has."""

import os
import signal

import pytest
from support.clients import assert_holds
from support.managed import names
from support.processes import wait_gone
from support.trainers import Ranks, TrainerRaised

LOOP = """
step = 0
while True:
    step += 1
    tensors = state(1, step)
    manager.save(step, tensors, metadata={"why": "preempted"})
    if step == 3:
        os.write(1, b"training\\n")
    if manager.preempted:
        report = manager.drain(30)
        break
    time.sleep(0.001)
"""


def begin(trainer, root, **options):
    """Install the handler, as a user's script does, and make a manager that saves nothing of its own accord."""
    trainer.do(
        "handler = dcp.install_preemption_handler(**options)\n"
        "manager = dcp.CheckpointManager(root, dcp.ManagerOptions(every_steps=1 << 20))",
        root=str(root),
        options=options,
    )


@pytest.fixture
def trainer(daemon, trainers, tmp_path):
    started = trainers.start()
    begin(started, tmp_path / "run")
    return started


def test_the_step_in_hand_is_saved_and_the_loop_ends(trainer, tmp_path):
    trainer.start(LOOP)
    os.kill(trainer.pid, signal.SIGTERM)
    trainer.finish()
    step = trainer.get("step")
    assert names(tmp_path / "run") == [f"step-{step}"]
    assert trainer.get("report.safe and report.committed") == (str(tmp_path / "run" / f"step-{step}"),)
    assert trainer.get("manager.latest().metadata") == {"why": "preempted"}
    assert_holds(tmp_path / "run" / f"step-{step}", value=float(step))


def test_a_signal_in_the_middle_of_a_save_does_no_harm(trainer, tmp_path):
    trainer.do(
        "import ckptd.staging.copy as staging\n"
        "real = staging.Copier.copy\n"
        "def copy(*a):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return real(*a)\n"
        "staging.Copier.copy = copy\n"
        "tensors = state(1, 7.0)\n"
        "future = manager.save(7, tensors, force=True)\n"
        "staging.Copier.copy = real\n"
        "future.result(30)"
    )
    assert_holds(tmp_path / "run" / "step-7", value=7.0)
    assert trainer.get("(handler.requested, manager.preempted)") == (True, False)
    assert trainer.get("(manager.should_save(8), manager.preempted)") == (True, True)


def test_one_may_leave_at_once_and_the_daemon_finishes(daemon, trainers, tmp_path):
    started = trainers.start()
    begin(started, tmp_path / "run", when="now")
    started.start(LOOP)
    os.kill(started.pid, signal.SIGTERM)
    with pytest.raises(TrainerRaised) as left:
        started.finish()
    assert (left.value.kind, left.value.text) == ("SystemExit", "143")
    step = started.get("step")
    started.kill()  # whatever becomes of it
    daemon.wait_for_save(tmp_path / "run" / f"step-{step}", lambda save: save["state"] == "committed")
    assert_holds(tmp_path / "run" / f"step-{step}", value=float(step))


def test_the_handler_of_the_users_own_is_called_too(daemon, trainers, tmp_path):
    started = trainers.start()
    started.do("calls = []\nsignal.signal(signal.SIGTERM, lambda *_: calls.append('mine'))")
    begin(started, tmp_path / "run")
    os.kill(started.pid, signal.SIGTERM)
    started.do(LOOP)
    assert started.get("(calls, step)") == (["mine"], 1)


def test_without_the_handler_a_signal_ends_the_trainer_as_ever(daemon, trainers):
    started = trainers.start()
    started.do("handler = dcp.install_preemption_handler()\nhandler.uninstall()")
    os.kill(started.pid, signal.SIGTERM)
    wait_gone(started.pid)


def test_a_signal_to_one_rank_ends_all_at_the_same_step(daemon, trainers, tmp_path):
    ranks = Ranks(trainers.start(GLOO_SOCKET_IFNAME="lo") for _ in range(2))
    ranks.do(
        "dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=world_size)\n"
        "handler = dcp.install_preemption_handler()\n"
        "manager = dcp.CheckpointManager(root, dcp.ManagerOptions(every_steps=1 << 20))\n"
        "flag = torch.zeros(1)",
        store=str(tmp_path / "store"),
        root=str(tmp_path / "run"),
    )
    for rank, trainer in enumerate(ranks):
        trainer.start(
            "step = 0\n"
            "while True:\n"
            "    step += 1\n"
            "    dist.all_reduce(flag)\n"  # as gradients do: ranks are at most a step apart
            "    manager.save(step, {f'r{rank}': torch.full((9,), float(step))})\n"
            "    if manager.preempted: break\n"
            "report = manager.drain(30)",
            rank=rank,
        )
    os.kill(ranks[1].pid, signal.SIGTERM)
    ranks.finish()
    [(step, safe, here), other] = ranks.get("(step, report.safe, handler.requested)")
    assert other == (step, True, True)
    assert (safe, here) == (True, False)
    assert names(tmp_path / "run") == [f"step-{step}"]


def test_draining_without_enough_time_tells_what_the_daemon_has(daemon, trainers, tmp_path):
    started = trainers.start()
    [worker] = start_worker(daemon, started, tmp_path)
    os.kill(worker, signal.SIGSTOP)
    try:
        started.do(
            "future = manager.save(2, state(1, 2.0))\n"
            "future.staging_completion.result(30)\n"
            "report = manager.drain(0.05)"
        )
        assert started.get("(report.safe, report.committed, report.staged)") == (
            True,
            (),
            (str(tmp_path / "run" / "step-2"),),
        )
        started.kill()
    finally:
        os.kill(worker, signal.SIGCONT)
    daemon.wait_for_save(tmp_path / "run" / "step-2", lambda save: save["state"] == "committed")
    assert_holds(tmp_path / "run" / "step-2", value=2.0)


def start_worker(daemon, trainer, tmp_path):
    """Make a first save and return the pids of the workers that wrote it."""
    trainer.do("manager = dcp.CheckpointManager(root)\nmanager.save(1, state()).result(30)", root=str(tmp_path / "run"))
    return daemon.workers(1)
