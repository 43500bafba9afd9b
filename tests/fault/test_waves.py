"""Deaths in the middle of a save that is staged in waves: nothing half is published, and the next save works."""

import os
import signal
from contextlib import suppress

import pytest
from support.clients import assert_holds
from support.nursery import state
from support.processes import kill, stopped, wait_gone
from support.trainers import TrainerDied, TrainerRaised
from support.waiting import wait_until

MIB = 1 << 20
RING = "staging='waves', slots=2, slot_bytes=256 << 10"
# The save runs in a thread, which stops before it copies a wave when many before it have been written.
IN_THE_MIDDLE = """
reached, go, counted = threading.Event(), threading.Event(), []
original = session._copier.copy
def copy(pairs):
    counted.append(1)
    if len(counted) == 9:
        reached.set()
        go.wait()
    original(pairs)
session._copier.copy = copy
futures = []
save = lambda: futures.append(dcp.async_save(state(4, value), checkpoint_id=path))
thread = threading.Thread(target=save, daemon=True)
thread.start()
assert reached.wait(30)
"""


@pytest.fixture
def trainer(daemon, trainers):
    """A trainer with a ring of two small slots, in the middle of nothing yet."""
    trainer = trainers.start()
    trainer.do(f"session = dcp.connect(job='job', rank=0, world_size=1, {RING})")
    return trainer


def begin(trainer, path, value=2.0):
    """Have a save begun that stops in the middle."""
    trainer.do(IN_THE_MIDDLE, path=str(path), value=value)


def resume(trainer):
    """Let it go on, and return its outcome."""
    trainer.do("go.set()\nthread.join(60)")
    return trainer.get("outcome(futures[0])")


def slots(daemon):
    return [slot["state"] for job in daemon.status()["jobs"] for s in job["sessions"] for slot in s["slots"]]


def hidden(tmp_path):
    return list(tmp_path.glob(".*.ckptd-*"))


def test_a_trainer_that_dies_before_its_last_wave_publishes_nothing(daemon, trainer, trainers, tmp_path):
    trainer.do("dcp.save(state(4), checkpoint_id=path)", path=str(tmp_path / "a"))
    begin(trainer, tmp_path / "a")
    assert len(hidden(tmp_path)) == 1  # much of it is written
    trainer.kill()
    failed = daemon.wait_for_save(tmp_path / "a", lambda save: save["state"] == "failed")
    assert f"rank 0 (pid {trainer.pid})" in failed["error"]
    wait_until(lambda: not hidden(tmp_path), "the removal of what was written")
    assert_holds(tmp_path / "a", mib=4)
    successor = trainers.start()
    successor.do(f"session = dcp.connect(job='job', rank=0, world_size=1, {RING})")
    successor.do("dcp.save(state(4, 3.0), checkpoint_id=path)", path=str(tmp_path / "a"))
    assert_holds(tmp_path / "a", mib=4, value=3.0)


@pytest.mark.parametrize("message_too", [True, False])
def test_a_trainer_may_die_once_its_last_wave_is_staged(daemon, trainer, tmp_path, message_too):
    """Even if none of its last messages has left: the seals stand in the slots."""
    trainer.do("dcp.save(state(4), checkpoint_id=path)", path=str(tmp_path / "before"))
    source = "dcp.async_save(state(4, 2.0), checkpoint_id=path)\nos.kill(os.getpid(), signal.SIGKILL)"
    if not message_too:
        # A save is counted; of the next one, the messages of the last two waves do not leave: a ring holds no more.
        trainer.do(
            "sent, send, most = [], session._link.send_encoded, 1000\n"
            "def send_encoded(body):\n"
            "    sent.append(1)\n"
            "    if len(sent) <= most:\n"
            "        send(body)\n"
            "session._link.send_encoded = send_encoded\n"
            "dcp.save(state(4), checkpoint_id=path)\n"
            "most = 2 * len(sent) - 2\n",
            path=str(tmp_path / "before"),
        )
        assert trainer.get("len(sent)") > 10
    trainer.start(source, path=str(tmp_path / "last"))
    with pytest.raises(TrainerDied):
        trainer.finish()
    daemon.wait_for_save(tmp_path / "last", lambda save: save["state"] == "committed")
    assert_holds(tmp_path / "last", mib=4, value=2.0)
    assert daemon.metric("ckptd_worker_restarts_total") == 0


def test_a_worker_that_dies_between_waves_is_replaced(daemon, trainer, tmp_path):
    begin(trainer, tmp_path / "a")
    [worker] = daemon.workers()
    kill(worker)
    assert resume(trainer) == "committed"
    assert daemon.workers() != [worker]
    assert_holds(tmp_path / "a", mib=4, value=2.0)


def test_a_worker_that_dies_of_a_wave_has_it_done_again_by_another(daemon, trainer, tmp_path):
    begin(trainer, tmp_path / "a")
    [worker] = daemon.workers()
    with stopped(worker):
        trainer.do("go.set()")
        wait_until(lambda: slots(daemon) == ["persisting"] * 2, "waves that wait for the worker")
        os.kill(worker, signal.SIGKILL)
    assert resume(trainer) == "committed"
    assert daemon.metric("ckptd_worker_restarts_total") == 1
    assert_holds(tmp_path / "a", mib=4, value=2.0)


def test_a_file_that_vanishes_between_waves_is_an_error_and_no_file_with_holes(daemon, trainer, tmp_path):
    begin(trainer, tmp_path / "a")
    [folder] = hidden(tmp_path)
    (folder / "__0_0.distcp").unlink()
    assert "No such file or directory" in resume(trainer)
    assert not (tmp_path / "a").exists()
    wait_until(lambda: not hidden(tmp_path), "the removal of what was written")
    trainer.do("dcp.save(state(4, 3.0), checkpoint_id=path)", path=str(tmp_path / "a"))
    assert_holds(tmp_path / "a", mib=4, value=3.0)


def test_a_file_that_was_cut_short_between_waves_is_found(daemon, trainer, tmp_path):
    begin(trainer, tmp_path / "a")
    [folder] = hidden(tmp_path)
    with (folder / "__0_0.distcp").open("r+b") as file:
        file.truncate((8 << 20) - 4096)  # longer than it may be
    assert "has 8384512 bytes" in resume(trainer)
    assert not (tmp_path / "a").exists()


def test_a_daemon_that_dies_in_the_middle_is_followed_by_one_that_goes_on(start_daemon, daemon, trainer, tmp_path):
    trainer.do("dcp.save(state(4), checkpoint_id=path)", path=str(tmp_path / "a"))
    begin(trainer, tmp_path / "a")
    daemon.kill()
    start_daemon()
    assert resume(trainer) == "committed"
    assert_holds(tmp_path / "a", mib=4, value=2.0)
    trainer.do("dcp.save(state(4, 3.0), checkpoint_id=path)", path=str(tmp_path / "a"))
    assert_holds(tmp_path / "a", mib=4, value=3.0)
    daemon.runtime.daemon_was_killed = False


def test_the_last_waves_outlive_trainer_and_daemon(start_daemon, daemon, trainer, tmp_path):
    trainer.do("dcp.save(state(4), checkpoint_id=path)", path=str(tmp_path / "a"))
    begin(trainer, tmp_path / "a")
    workers = daemon.workers()
    with stopped(*workers):
        trainer.do("session._copier.copy = original\ngo.set()")
        wait_until(lambda: slots(daemon) == ["persisting"] * 2, "a ring that is full")
        daemon.kill()
    for worker in workers:
        wait_gone(worker)
    # The trainer stages on into what the next daemon frees, and dies once all is staged.
    between = start_daemon()
    trainer.start("thread.join(60)\nfutures[0].staging_completion.result(30)\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(TrainerDied):
        trainer.finish()
    if not (tmp_path / "a").exists() or between.generations()[-1]["state"] != "committed":
        between.kill()
        start_daemon()
    wait_until(lambda: not hidden(tmp_path), "the commit")
    assert_holds(tmp_path / "a", mib=4, value=2.0)
    daemon.runtime.daemon_was_killed = False


def test_a_trainer_and_a_daemon_that_die_in_the_middle_leave_nothing(start_daemon, daemon, trainer, tmp_path):
    trainer.do("dcp.save(state(4), checkpoint_id=path)", path=str(tmp_path / "a"))
    begin(trainer, tmp_path / "a")
    daemon.kill()
    trainer.kill()
    start_daemon()
    wait_until(lambda: not hidden(tmp_path), "the removal of what was written")
    assert_holds(tmp_path / "a", mib=4)
    daemon.runtime.daemon_was_killed = False


def test_a_rank_that_waits_for_a_slot_hears_that_another_rank_has_died(daemon, trainers, tmp_path):
    ranks = trainers.job(2, staging="waves", slots=2, slot_bytes=256 << 10)
    save = "future = dcp.async_save({f'w{rank}': torch.ones(4 << 18)}, checkpoint_id=path)"
    ranks.do(save, path=str(tmp_path / "before"))
    assert ranks.get("outcome(future)") == ["committed"] * 2
    with stopped(*daemon.workers(2)):
        ranks[0].start(save, path=str(tmp_path / "a"), rank=0)
        # The first wave makes the file, and the second waits for it.
        wait_until(lambda: {"persisting", "sealed"} <= set(slots(daemon)), "a ring that is full")
        ranks[1].kill()
    with suppress(TrainerRaised):
        ranks[0].finish()
    assert "rank 1" in ranks[0].get("outcome(future)")
    assert not (tmp_path / "a").exists()
    wait_until(lambda: slots(daemon) == ["free"] * 2, "slots that are free again")
    wait_until(lambda: not hidden(tmp_path), "the removal of what was written")


def test_a_copy_that_fails_in_the_middle_fails_the_save_and_frees_the_slots(daemon, trainer, tmp_path):
    begin(trainer, tmp_path / "a")
    trainer.do("def original(pairs):\n    raise RuntimeError('out of device memory')")
    assert "out of device memory" in resume(trainer)
    trainer.do("session._copier.copy = type(session._copier).copy.__get__(session._copier)")
    trainer.do("dcp.save(state(4, 3.0), checkpoint_id=path)", path=str(tmp_path / "a"))
    assert_holds(tmp_path / "a", mib=4, value=3.0)


def test_a_state_many_times_as_large_as_shared_memory_is_refused_and_saved_in_waves(
    mounts, start_daemon, client, tmp_path
):
    shm = mounts.tmpfs(mib=4, name="shm")
    start_daemon(shm_dir=str(shm))
    client.connect()
    future = client.async_save(state(24), checkpoint_id=tmp_path / "a")
    assert future.exception(30).code == "shm_too_small"
    assert 'connect(staging="waves")' in str(future.exception())
    client.connect(staging="waves", slots=2, slot_bytes=MIB)
    client.save(state(24, 2.0), checkpoint_id=tmp_path / "a")
    assert_holds(tmp_path / "a", mib=24, value=2.0)


def test_a_disk_that_is_too_small_for_all_waves_is_refused_before_the_first(mounts, daemon, client, tmp_path):
    disk = mounts.tmpfs(mib=4, name="disk")
    client.connect(staging="waves", slots=2, slot_bytes=MIB)
    future = client.async_save(state(8), checkpoint_id=disk / "a")
    assert future.exception(30).code == "disk_full"
    assert list(disk.iterdir()) == []
    client.save(state(2), checkpoint_id=disk / "a")
    assert_holds(disk / "a", mib=2)
