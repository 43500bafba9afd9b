"""One daemon of root for all users: workers run as the trainer's user, so the kernel checks every path."""

import os
import shutil
import tempfile
from pathlib import Path

import psutil
import pytest
from support.clients import assert_holds
from support.managed import names, write_managed
from support.memory import ABSENT, LOAD, SERVED, VALUES, values
from support.mounts import need_root
from support.trainers import Nursery, Trainers
from support.trees import below
from support.users import NOBODY, open_interpreter
from support.waiting import wait_until


@pytest.fixture
def users_folder(runtime):
    """A folder that only the user can write, below one that everyone can enter."""
    need_root("system mode")
    folder = Path(tempfile.mkdtemp(prefix="ckuser", dir="/tmp"))
    folder.chmod(0o755)
    (folder / "theirs").mkdir(mode=0o700)
    os.chown(folder / "theirs", NOBODY, NOBODY)
    (folder / "roots").mkdir(mode=0o755)
    runtime.watched.append(folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def system_daemon(runtime, users_folder, start_daemon, tmp_path):
    Path(runtime.path).chmod(0o755)
    return start_daemon(mode="system", prefix=open_interpreter(tmp_path))


@pytest.fixture
def user(runtime, system_daemon, tmp_path):
    """A trainer of another user."""
    nursery = Nursery(open_interpreter(tmp_path))
    trainers = Trainers(nursery, runtime)
    yield trainers.start(uid=NOBODY)
    trainers.close()
    nursery.close()


def test_a_users_save_is_written_as_that_user(system_daemon, user, users_folder):
    user.do("session = dcp.connect()\ndcp.save(state(2), checkpoint_id=path)", path=str(users_folder / "theirs" / "a"))
    written = [users_folder / "theirs" / "a", *(users_folder / "theirs" / "a").iterdir()]
    assert {path.stat().st_uid for path in written} == {NOBODY}
    assert len(written) == 4
    [worker] = system_daemon.workers()
    assert set(psutil.Process(worker).uids()) == {NOBODY}
    assert set(psutil.Process(worker).gids()) == {NOBODY}
    assert psutil.Process(system_daemon.pid).uids().real == 0
    for arena in below(system_daemon.runtime.arenas, "*.arena"):
        assert (arena.stat().st_uid, arena.stat().st_mode & 0o777) == (NOBODY, 0o600)
    [job] = system_daemon.status()["jobs"]
    assert job["uid"] == NOBODY
    assert_holds(users_folder / "theirs" / "a", mib=2)
    # Where the user may not write, neither may the worker, though the daemon could.
    user.do("future = dcp.async_save(state(2), checkpoint_id=path)", path=str(users_folder / "roots" / "a"))
    error = user.get("outcome(future)")
    assert "Permission denied" in error
    assert str(users_folder / "roots") in error
    assert list((users_folder / "roots").iterdir()) == []
    user.do("dcp.save(state(2, 3.0), checkpoint_id=path)", path=str(users_folder / "theirs" / "a"))
    assert_holds(users_folder / "theirs" / "a", mib=2, value=3.0)


def test_users_jobs_of_one_name_are_two_jobs(system_daemon, user, trainers, users_folder, tmp_path):
    user.do("session = dcp.connect(job='same', rank=0, world_size=1)")
    [root] = trainers.job(1, name="same")
    user.do("dcp.save(state(value=1.0), checkpoint_id=path)", path=str(users_folder / "theirs" / "a"))
    root.do("dcp.save(state(value=2.0), checkpoint_id=path)", path=str(tmp_path / "a"))
    assert sorted(job["uid"] for job in system_daemon.status()["jobs"]) == [0, NOBODY]
    assert_holds(users_folder / "theirs" / "a", value=1.0)
    assert_holds(tmp_path / "a", value=2.0)


def test_a_save_in_memory_is_its_own_users_alone(runtime, users_folder, start_daemon, trainers, tmp_path):
    Path(runtime.path).chmod(0o755)
    prefix = open_interpreter(tmp_path)
    daemon = start_daemon(mode="system", prefix=prefix, retain_s=600.0)
    nursery = Nursery(prefix)
    users = Trainers(nursery, runtime)
    path = users_folder / "theirs" / "a"
    users.start(uid=NOBODY).do("dcp.save(state(value=2.0), checkpoint_id=path)", path=str(path))
    (users_folder / "theirs").chmod(0o755)
    others = trainers.start()
    for trainer, source in ((others, "disk"), (users.start(uid=NOBODY), "memory")):
        trainer.do(LOAD, mib=1, path=str(path))
        assert trainer.get(VALUES) == values(source, 2.0)
    assert (daemon.metric(ABSENT), daemon.metric(SERVED)) == (1, 1)
    users.close()
    nursery.close()


def test_retention_runs_as_the_user_who_asks_for_it(system_daemon, user, users_folder):
    for folder in ("theirs", "roots"):
        for step in (1, 2):
            write_managed(users_folder / folder, step)
    for path in (users_folder / "theirs").rglob("*"):
        os.chown(path, NOBODY, NOBODY)
    user.do(
        "for root in roots: dcp.CheckpointManager(root, dcp.ManagerOptions(keep_last=1)).retain()",
        roots=[str(users_folder / "roots"), str(users_folder / "theirs")],
    )
    wait_until(lambda: names(users_folder / "theirs") == ["step-2"], "the user's own removal")
    log = wait_until(lambda: "Permission denied" in system_daemon.log() and system_daemon.log(), "a refusal")
    assert f"removed nothing from {users_folder / 'roots'}" in log
    assert names(users_folder / "roots") == ["step-1", "step-2"]
