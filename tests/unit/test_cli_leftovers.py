"""What counts as left over, and what never does."""

from __future__ import annotations

import fcntl
import os
import time

import pytest
from support.checkpoints import write_checkpoint

from ckptd.daemon.cli.leftovers import (
    HiddenSave,
    arena_directories,
    hidden_saves,
    names_back,
    reason_to_keep,
    remove_arenas,
    settle,
)
from ckptd.daemon.recovery.directories import name_for
from ckptd.protocol.errors import SystemCallFailed
from ckptd.staging.arena import SlotState, create_arena, hold, let_go, write_slot_state

RUNTIME = "/nowhere/of/this/test"
NAME = f"ckptd-0-{name_for(RUNTIME)}"
HOUR_S = 3600.0


@pytest.fixture
def root(tmp_path):
    """A daemon's directory on what the test takes for a tmpfs."""
    root = tmp_path / NAME
    root.mkdir(mode=0o711)
    return root


def claim(root):
    """Be the daemon of a directory until the returned descriptor is closed."""
    descriptor = os.open(root, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


class TestArenas:
    def test_a_live_daemons_directory_is_live_until_its_lock_goes(self, tmp_path, root):
        lock = claim(root)
        [found] = arena_directories(str(tmp_path))
        assert (found.path, found.live) == (str(root), True)
        assert remove_arenas(str(root)) == "a daemon has taken it in the meantime"
        os.close(lock)
        [found] = arena_directories(str(tmp_path))
        assert not found.live
        assert remove_arenas(str(root)) == ""
        assert not root.exists()
        assert remove_arenas(str(root)) == "", "gone is gone"

    def test_a_daemon_is_found_by_the_name_of_its_directory(self, tmp_path, root, monkeypatch):
        assert [found.runtime for found in arena_directories(str(tmp_path))] == [""]
        monkeypatch.setenv("CKPTD_RUNTIME_DIR", RUNTIME)
        assert [found.runtime for found in arena_directories(str(tmp_path))] == [RUNTIME]
        (tmp_path / f"ckptd-4711-{name_for('/run/user/4711/ckptd')}").mkdir()
        assert "/run/user/4711/ckptd" in [found.runtime for found in arena_directories(str(tmp_path))]

    def test_arenas_that_a_live_trainer_holds_wait_for_the_next_daemon(self, tmp_path, root):
        arena = create_arena(str(root / "rank-0-1.arena"), slots=1, slot_bytes=4096)
        held = hold(arena)
        os.close(arena)
        assert [found.waiting for found in arena_directories(str(tmp_path))] == [True]
        let_go(held)
        assert [found.waiting for found in arena_directories(str(tmp_path))] == [False]

    def test_other_names_are_not_ours(self, tmp_path):
        for name in ("ckptd", "ckptd-0-x", "ckptd-0-0123456789abc", "other"):
            (tmp_path / name).mkdir()
        assert arena_directories(str(tmp_path)) == []

    @pytest.mark.parametrize(
        ("state", "sealed"), [(SlotState.FREE, 0), (SlotState.SEALED, 1), (SlotState.PERSISTING, 1)]
    )
    def test_what_a_restarted_daemon_could_finish_is_counted(self, tmp_path, root, state, sealed):
        (root / "job-x").mkdir()
        arena = create_arena(str(root / "job-x" / "rank-0-1.arena"), slots=2, slot_bytes=8192)
        write_slot_state(arena, 1, state)
        os.close(arena)
        (root / "job-x" / "torn.arena").write_bytes(b"short")
        (root / "job-x" / "1.plan").write_bytes(b"x" * 5000)
        [found] = arena_directories(str(tmp_path))
        assert found.sealed == sealed
        assert found.nbytes >= 2 * 8192 + 5000

    def test_a_tmpfs_that_is_not_there_is_an_error(self, tmp_path):
        with pytest.raises(SystemCallFailed, match="gone"):
            arena_directories(str(tmp_path / "gone"))


@pytest.fixture
def hidden(tmp_path):
    """A hidden directory of a save of ``a``, two hours old."""
    path = tmp_path / "run" / ".a.ckptd-job-1-2-0a"
    path.mkdir(parents=True)
    (path / "__0_0.distcp").write_bytes(b"x" * 5000)
    age(path)
    return path


def age(path, seconds=2 * HOUR_S):
    past = time.time() - seconds
    for file in [*path.iterdir(), path]:
        os.utime(file, (past, past))


def look(tmp_path):
    [found] = hidden_saves(str(tmp_path))
    return found


def judge(save, busy=(), older_than_s=HOUR_S):
    return reason_to_keep(save, busy=set(busy), now_unix_s=time.time(), older_than_s=older_than_s)


class TestHiddenSaves:
    def test_an_old_unfinished_save_is_found_and_goes(self, tmp_path, hidden):
        save = look(tmp_path)
        found = (save.path, save.checkpoint_id, save.save_id, save.uid)
        assert found == (str(hidden), str(tmp_path / "run" / "a"), "job-1-2-0a", os.geteuid())
        assert save.nbytes >= 5000
        assert judge(save) == ""
        assert not names_back(save)
        assert settle(save) == ""
        assert list((tmp_path / "run").iterdir()) == []
        assert settle(save) == "", "gone is gone"

    def test_what_a_daemon_works_on_stays_whatever_its_age(self, tmp_path, hidden):
        assert judge(look(tmp_path), busy=[str(tmp_path / "run" / "a")]) == "a daemon is working on it"
        assert judge(look(tmp_path), busy=[str(tmp_path / "run" / "b")]) == ""

    def test_what_changed_lately_may_be_another_nodes(self, tmp_path, hidden):
        (hidden / "__1_0.distcp").write_bytes(b"x")
        assert "less than --older-than" in judge(look(tmp_path))
        assert judge(look(tmp_path), older_than_s=0) == ""

    def test_what_may_be_the_last_copy_of_something_stays(self, tmp_path, hidden):
        (hidden / "notes.txt").write_text("a user's")
        age(hidden)
        assert judge(look(tmp_path)) == "it may hold the last copy of something; look into it yourself"
        assert settle(look(tmp_path)) == "neither provably a dead save's nor a whole checkpoint"
        assert hidden.exists()

    def test_the_last_copy_of_a_checkpoint_gets_its_name_back(self, tmp_path):
        (tmp_path / "run").mkdir()
        path = tmp_path / "run" / ".a.ckptd-job-1-2-0a.old"
        path.mkdir()
        write_checkpoint(path)
        age(path)
        save = look(tmp_path)
        assert judge(save) == ""
        assert names_back(save)
        assert settle(save) == ""
        assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["a"]

    def test_a_checkpoint_whose_removal_was_cut_short_goes_and_does_not_come_back(self, tmp_path):
        (tmp_path / "run").mkdir()
        path = tmp_path / "run" / ".a.ckptd-removed-0a1b2c3d"
        path.mkdir()
        write_checkpoint(path)
        age(path)
        save = look(tmp_path)
        assert (judge(save), names_back(save)) == ("", False)
        assert settle(save) == ""
        assert list((tmp_path / "run").iterdir()) == []

    def test_a_save_that_a_process_has_locked_stays(self, tmp_path, hidden):
        descriptor = claim(hidden)
        assert judge(look(tmp_path)) == "another process has locked it, or it is not ours"
        os.close(descriptor)
        assert judge(look(tmp_path)) == ""

    def test_links_are_not_followed_and_hidden_ones_not_entered(self, tmp_path, hidden):
        (tmp_path / "elsewhere").symlink_to(hidden.parent)
        (hidden / ".b.ckptd-1").mkdir()
        assert [save.path for save in hidden_saves(str(tmp_path))] == [str(hidden)]

    def test_a_folder_that_is_not_there_is_an_error(self, tmp_path):
        with pytest.raises(SystemCallFailed, match="gone"):
            list(hidden_saves(str(tmp_path / "gone")))

    def test_a_file_that_cannot_be_deleted_is_named(self, tmp_path, hidden, monkeypatch):
        def rmtree(path):
            raise PermissionError(13, "no", f"{path}/__0_0.distcp")

        monkeypatch.setattr("shutil.rmtree", rmtree)
        assert "__0_0.distcp: Permission denied" in settle(look(tmp_path))


def test_a_clock_that_went_backwards_keeps_things():
    save = HiddenSave("/r/.a.ckptd-1", "/r/a", "1", 0, 0, changed_unix_s=2000.0)
    assert reason_to_keep(save, busy=(), now_unix_s=1000.0, older_than_s=1.0).startswith("changed 0 s ago")
