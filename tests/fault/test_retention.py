"""Removals that are killed, forbidden or raced: a reader finds a whole checkpoint or none, and nothing stays behind."""

import os

import pytest
from support.managed import names
from support.nursery import state
from support.sabotage import sabotage
from support.waiting import wait_until

from ckptd.checkpoint.verify import verify_checkpoint


def keeping(client, root, last=1):
    return client.CheckpointManager(root, client.ManagerOptions(keep_last=last))


def last_removal(daemon):
    return daemon.status()["jobs"][-1]["retention"]["last"]


def test_a_killed_worker_is_replaced_and_its_removal_done_again(start_daemon, client, tmp_path):
    (tmp_path / "marks").mkdir()
    daemon = start_daemon(environment=sabotage(tmp_path / "marks", "before_removal", times=2))
    manager = keeping(client, tmp_path / "run")
    for step in (1, 2):
        manager.save(step, state(1, step)).result(30)
    wait_until(lambda: names(tmp_path / "run") == ["step-2"], "the removal")
    wait_until(lambda: daemon.metric("ckptd_worker_restarts_total") == 2, "two deaths")


def test_what_a_killed_removal_left_is_hidden_and_swept_by_the_next(start_daemon, client, tmp_path):
    (tmp_path / "marks").mkdir()
    daemon = start_daemon(environment=sabotage(tmp_path / "marks", "before_removal", times=1), work_attempts=1)
    root = tmp_path / "run"
    manager = keeping(client, root)
    for step in (1, 2):
        manager.save(step, state(1, step)).result(30)
    error = wait_until(lambda: last_removal(daemon).get("errors"), "a removal that was killed")
    assert "died" in error[0]
    [hidden, kept] = names(root)
    assert hidden.startswith(".step-1.ckptd-removed-")
    assert kept == "step-2"
    assert verify_checkpoint(str(root / hidden)).good  # the name went, in one step, and nothing else yet
    assert manager.steps() == [2]
    manager.save(3, state(1, 3.0)).result(30)
    wait_until(lambda: names(root) == ["step-3"], "the next removal")


def test_a_removal_that_fails_is_told_and_costs_no_save(daemon, client, tmp_path, mounts):
    root = tmp_path / "run"
    manager = keeping(client, root)
    manager.save(1, state()).result(30)
    (root / "step-1" / "users").mkdir()
    mounts._mount(root / "step-1" / "users" / "mount", "tmpfs", "size=1m")  # what is mounted cannot be removed
    manager.save(2, state(1, 2.0)).result(30)
    errors = wait_until(lambda: last_removal(daemon).get("errors"), "a failed removal")
    assert "busy" in errors[0]
    manager.save(3, state(1, 3.0)).result(30)
    assert manager.latest().step == 3
    assert "step-3" in names(root)
    left = next(path for path in root.iterdir() if path.name.startswith(".step-1."))
    mounts._mounted[-1] = left / "users" / "mount"  # where it is now
    mounts._run("umount", str(mounts._mounted.pop()))
    manager.save(4, state(1, 4.0)).result(30)
    wait_until(lambda: names(root) == ["step-4"], "the next removal")


def test_a_root_that_cannot_be_written_fails_saves_and_nothing_else(daemon, client, tmp_path, mounts):
    disk = mounts.tmpfs(mib=16, name="disk")
    manager = client.CheckpointManager(disk, client.ManagerOptions(keep_last=1, on_failure="continue"))
    manager.save(1, state()).result(30)
    mounts.read_only(disk)
    try:
        future = manager.save(2, state(1, 2.0))
        assert "Read-only file system" in str(future.exception(30))
        with pytest.raises(client.errors.SystemCallFailed, match="Read-only"):
            manager.pin(1)
        manager.retain()
        found = state(1, -1.0)
        assert manager.restore(found).step == 1
    finally:
        mounts.writable(disk)
    assert (manager.failures.in_all, manager.failures.in_a_row) == (1, 1)
    manager.save(3, state(1, 3.0)).result(30)
    assert manager.failures.in_a_row == 0
    wait_until(lambda: names(disk) == ["step-3"], "the removal")


def test_training_pauses_until_there_is_room_again(daemon, client, tmp_path, mounts, trainers):
    disk = mounts.tmpfs(mib=4, name="disk")
    trainer = trainers.start()
    trainer.do(
        "from ckptd.client import failure_policy\n"
        "manager = dcp.CheckpointManager(root, dcp.ManagerOptions(on_failure='pause', pause_timeout_s=60))\n"
        "first = outcome(manager.save(1, state(2)))",
        root=str(disk),
    )
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 3 << 19)
    trainer.do("second = outcome(manager.save(2, state(2, 2.0)))")
    assert trainer.get("first") == "committed"
    assert "DiskFull" in trainer.get("second")
    trainer.start("third = manager.save(3, state(2, 3.0))\nthird.result(30)")
    wait_until(lambda: daemon.metric('ckptd_saves_total{outcome="failed"}') >= 2, "a try of the third save")
    ballast.unlink()
    (disk / "step-1" / "__0_0.distcp").unlink()  # make room
    trainer.finish()
    assert trainer.get("(manager.latest().step, manager.failures.in_a_row)") == (3, 0)


def test_readers_never_see_half_a_checkpoint_while_removals_run(daemon, client, tmp_path, trainers):
    root = tmp_path / "run"
    trainer = trainers.start()
    trainer.start(
        "manager = dcp.CheckpointManager(root, dcp.ManagerOptions(keep_last=1))\n"
        "for step in range(25): manager.save(step, state(1, step)).result(30)",
        root=str(root),
    )
    reader = client.CheckpointManager(root)
    seen = set()
    while 24 not in seen:
        found = state(1, -1.0)
        restored = reader.restore(found)
        if restored is not None:
            assert restored.report.passed_over == ()
            assert found["step"] == restored.step
            assert (found["model"]["w"] == restored.step).all()
            seen.add(restored.step)
    trainer.finish()
    assert len(seen) > 1
