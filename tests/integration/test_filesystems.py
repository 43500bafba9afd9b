"""File systems of all kinds, without O_DIRECT or an exchange of names too: checkpoints are the same."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.clients import assert_holds
from support.mounts import need_root, unavailable
from support.nursery import state
from support.processes import stopped, wait_gone
from support.waiting import wait_until

CKPTD = str(Path(sys.executable).with_name("ckptd"))
KINDS = {
    "disk": lambda mounts, tmp_path: tmp_path,
    "tmpfs": lambda mounts, tmp_path: mounts.tmpfs(mib=64),
    "ramfs": lambda mounts, tmp_path: mounts.ramfs(),
    "overlay": lambda mounts, tmp_path: mounts.overlay(),
    "xfs": lambda mounts, tmp_path: mounts.loop("xfs"),
    "btrfs": lambda mounts, tmp_path: mounts.loop("btrfs"),
    "ext4": lambda mounts, tmp_path: mounts.loop("ext4"),
    "fuse": lambda mounts, tmp_path: mounts.fuse(),
}
WITHOUT_DIRECT = {"ramfs"}
WITHOUT_EXCHANGE = {"fuse"}


def can_exchange(directory):
    """Say whether two names can be exchanged in one step."""
    from ckptd.checkpoint.system import rename_exchange

    one, other = directory / "one", directory / "other"
    one.mkdir(), other.mkdir()
    try:
        return rename_exchange(str(one), str(other))
    finally:
        one.rmdir(), other.rmdir()


def takes_direct(directory):
    """Say whether files can be opened with O_DIRECT."""
    path = directory / "probe"
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError as error:
        assert error.errno == errno.EINVAL
        return False
    finally:
        path.unlink()
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_good_on(mounts, start_daemon, client, tmp_path, kind):
    place = KINDS[kind](mounts, tmp_path)
    assert kind not in WITHOUT_DIRECT or not takes_direct(place)
    assert can_exchange(place) is (kind not in WITHOUT_EXCHANGE)
    daemon = start_daemon(write_chunk_bytes=4096, write_threads=1)
    client.save(state(3), checkpoint_id=place / "a")
    assert_holds(place / "a", mib=3)
    (place / "a" / "notes.txt").write_text("mine")
    client.save(state(3, 2.0), checkpoint_id=place / "a")  # an exchange of names, where there is one
    assert_holds(place / "a", mib=3, value=2.0)
    future = client.async_save(state(3, 3.0), checkpoint_id=place / "a")
    kill_a_writing_worker(daemon, place / "a")
    future.result(30)
    assert_holds(place / "a", mib=3, value=3.0)
    assert subprocess.run([CKPTD, "verify", str(place / "a")], timeout=30, check=False).returncode == 0
    held = sorted(path.name for path in (place / "a").iterdir())
    assert held == [".ckptd", ".metadata", "__0_0.distcp", "notes.txt"]
    assert not list(place.glob(".a*"))


def kill_a_writing_worker(daemon, path):
    """Kill the worker that saves, in the middle of it or at any later moment."""
    daemon.wait_for_save(path, lambda save: save["bytes_done"] > 0)
    [worker] = daemon.workers()
    os.kill(worker, signal.SIGKILL)
    wait_gone(worker)


def test_a_quota_is_named(mounts, daemon, client):
    disk = mounts.loop("btrfs")
    folder = mounts.quota(disk, mib=6)
    client.save(state(2), checkpoint_id=folder / "a")
    for mib in (8, 5):  # the second would fit alone, but not beside the old one
        error = client.async_save(state(mib, 2.0), checkpoint_id=folder / "a").exception(30)
        assert error.errno == errno.EDQUOT
        assert str(folder) in error.path
        assert_holds(folder / "a", mib=2)
        wait_until(lambda: [path.name for path in folder.iterdir()] == ["a"], "no leftovers")
    client.save(state(8), checkpoint_id=disk / "b")
    client.save(state(1, 3.0), checkpoint_id=folder / "a")
    assert_holds(folder / "a", value=3.0)


def test_a_directory_in_which_nothing_may_be_made_is_named(daemon, client, tmp_path):
    """Root may write everywhere but where the file system's own flag forbids it."""
    need_root("chattr +i")
    folder = tmp_path / "immutable"
    client.save(state(), checkpoint_id=folder / "a")
    done = subprocess.run(["chattr", "+i", str(folder)], capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        unavailable(f"chattr: {done.stderr}")
    try:
        error = client.async_save(state(value=2.0), checkpoint_id=folder / "a").exception(30)
        assert (error.call, error.errno) == ("mkdir", errno.EPERM)
        assert str(folder) in error.path
        assert_holds(folder / "a")
    finally:
        subprocess.run(["chattr", "-i", str(folder)], timeout=20, check=True)
    client.save(state(value=3.0), checkpoint_id=folder / "a")
    assert_holds(folder / "a", value=3.0)


@pytest.mark.parametrize("what", ["hidden directory", "parent", "parent, replaced by another", "parent, by a link"])
def test_what_is_removed_while_a_save_runs_fails_it(start_daemon, client, tmp_path, what):
    daemon = start_daemon(write_chunk_bytes=4096, write_threads=1)
    parent, moved = tmp_path / "runs", tmp_path / "moved"
    client.save(state(8), checkpoint_id=parent / "a")
    future = client.async_save(state(8, 2.0), checkpoint_id=parent / "a")
    daemon.wait_for_save(parent / "a", lambda save: save["state"] != "committed" and save["bytes_done"] > 0)
    with stopped(*daemon.workers()):
        [hidden] = parent.glob(".a.ckptd-*")
        if what == "hidden directory":
            shutil.rmtree(hidden)
        else:
            parent.rename(moved)
        if "another" in what:
            parent.mkdir()
        elif "link" in what:
            (tmp_path / "other").mkdir()
            parent.symlink_to("other")
        elif what == "parent":
            shutil.rmtree(moved)
    error = future.exception(30)
    assert error.errno == errno.ENOENT
    assert str(parent) in error.path
    if what == "hidden directory":
        assert_holds(parent / "a", mib=8)
    else:
        assert not (parent / "a").exists()
    shutil.rmtree(moved, ignore_errors=True)
    client.save(state(8, 3.0), checkpoint_id=parent / "a")
    assert_holds(parent / "a", mib=8, value=3.0)
    wait_until(lambda: [path.name for path in parent.iterdir()] == ["a"], "no leftovers")


def test_a_rank_whose_file_was_removed_fails_the_save_of_all(daemon, trainers, tmp_path):
    """Another rank's writer would make the directory anew: what is published is counted again."""
    ranks = trainers.job(2)
    ranks.do("dcp.save(state(4), checkpoint_id=path)", path=str(tmp_path / "a"))
    workers = daemon.workers(2)
    with stopped(*workers):
        ranks.do("future = dcp.async_save(state(4, 2.0), checkpoint_id=path)", path=str(tmp_path / "a"))
        daemon.wait_for_save(tmp_path / "a", lambda save: save["ranks_sealed"] == 2)
        os.kill(workers[0], signal.SIGCONT)
        [file] = wait_until(lambda: list(tmp_path.glob(".a.ckptd-*/__*")), "the file of a rank")
        daemon.wait_for_save(tmp_path / "a", lambda save: save["bytes_done"] == file.stat().st_size > 0)
        hidden = file.parent
        shutil.rmtree(hidden)
    errors = ranks.get("outcome(future)")
    assert errors[0] == errors[1]
    assert str(hidden) in errors[0]
    assert_holds(tmp_path / "a", mib=4)
    ranks.do("dcp.save(state(4, 3.0), checkpoint_id=path)", path=str(tmp_path / "a"))
    assert_holds(tmp_path / "a", mib=4, value=3.0)
