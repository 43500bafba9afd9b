"""Where no daemon runs, the client starts a private one: one per node and user, outside the trainer's process group."""

import os

import pytest
from support.clients import assert_holds
from support.processes import is_daemon, processes_of, wait_gone
from support.waiting import wait_until


def daemons(runtime):
    return [pid for pid in processes_of(runtime.path) if is_daemon(pid)]


@pytest.fixture
def environment(runtime):
    """What lets a trainer start a daemon that ends soon after its last trainer."""
    return {"CKPTD_EMBEDDED": "1", "CKPTD_CONFIG": runtime.configure(idle_exit_s=0.5)}


def test_trainers_that_start_at_the_same_time_share_one_daemon(runtime, trainers, environment, tmp_path):
    several = [trainers.start(**environment) for _ in range(3)]
    for number, trainer in enumerate(several):
        trainer.start(
            "session = dcp.connect()\ndcp.save(state(), checkpoint_id=path)", path=str(tmp_path / str(number))
        )
    for trainer in several:
        trainer.finish()
    [pid] = {trainer.get("session.daemon_pid") for trainer in several}
    wait_until(lambda: daemons(runtime) == [pid], "the end of the daemons that came too late")
    for trainer in several:
        assert os.getsid(pid) != os.getsid(trainer.pid)
        assert os.getpgid(pid) != os.getpgid(trainer.pid)
    for number in range(3):
        assert_holds(tmp_path / str(number))


def test_an_embedded_daemon_finishes_and_ends_when_it_has_been_idle(runtime, trainers, environment, tmp_path):
    trainer = trainers.start(**environment)
    trainer.start(
        "session = dcp.connect()\n"
        "dcp.async_save(state(4), checkpoint_id=path).staging_completion.result()\n"
        "os.killpg(os.getpgid(0), signal.SIGKILL)",  # as a launcher does
        path=str(tmp_path / "a"),
    )
    wait_gone(trainer.pid)
    wait_until(lambda: not daemons(runtime), "the end of the idle daemon")
    assert not processes_of(runtime.path)
    assert not runtime.arenas.exists()
    assert_holds(tmp_path / "a", mib=4)


def test_an_embedded_daemon_stays_while_a_trainer_is_connected(runtime, trainers, environment, tmp_path):
    trainer = trainers.start(**environment)
    trainer.do("session = dcp.connect()")
    pid = trainer.get("session.daemon_pid")
    other = trainers.start(**environment)  # its short life passes several idle times of the first
    other.do("dcp.save(state(), checkpoint_id=path)", path=str(tmp_path / "b"))
    other.leave()
    wait_until(lambda: daemons(runtime) == [pid], "one daemon")  # a worker looks like one until it has its own image
    trainer.do("dcp.save(state(), checkpoint_id=path)", path=str(tmp_path / "a"))
    assert trainer.get("session.live")
