"""What counts as left over, and what never does."""

from __future__ import annotations

import fcntl
import os
import time

import pytest

from ckptd.checkpoint.names import hidden_directory, parse_hidden
from ckptd.daemon.leftovers import (
    HiddenSave,
    arena_directories,
    hidden_saves,
    mark,
    reason_to_keep,
    remove_arenas,
    remove_hidden,
)
from ckptd.protocol.errors import SystemCallFailed
from ckptd.staging.arena import SlotState, create_arena, hold, let_go, write_slot_state

NAME = "ckptd-0-0123456789ab"
HOUR_S = 3600.0


@pytest.fixture
def root(tmp_path):
    """A daemon's directory on what the test takes for a tmpfs."""
    root = tmp_path / NAME
    root.mkdir(mode=0o711)
    return root


def test_a_hidden_name_is_taken_apart_as_it_was_made():
    path = hidden_directory("/runs/step.ckptd-7", "train_py-1-2-0a1b")
    assert parse_hidden(os.path.basename(path)) == ("step.ckptd-7", "train_py-1-2-0a1b")
    for name in ("step", ".step", ".ckptd-1", ".step.ckptd-", "step.ckptd-1"):
        assert parse_hidden(name) is None


def claim(root, runtime):
    """Be the daemon of a directory until the returned descriptor is closed."""
    descriptor = os.open(root, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    mark(root, runtime)
    return descriptor


class TestArenas:
    def test_a_live_daemons_directory_is_live_until_its_lock_goes(self, tmp_path, root):
        lock = claim(str(root), "/run/ckptd")
        [found] = arena_directories(str(tmp_path))
        assert (found.path, found.runtime, found.live) == (str(root), "/run/ckptd", True)
        assert not remove_arenas(str(root))
        os.close(lock)
        [found] = arena_directories(str(tmp_path))
        assert not found.live
        assert remove_arenas(str(root))
        assert not root.exists()
        assert remove_arenas(str(root)), "gone is gone"

    def test_arenas_that_a_live_trainer_holds_wait_for_the_next_daemon(self, tmp_path, root):
        os.close(claim(str(root), "/run/ckptd"))
        arena = create_arena(str(root / "rank-0-1.arena"), slots=1, slot_bytes=4096)
        held = hold(arena)
        os.close(arena)
        assert [found.waiting for found in arena_directories(str(tmp_path))] == [True]
        let_go(held)
        assert [found.waiting for found in arena_directories(str(tmp_path))] == [False]

    def test_a_directory_that_cannot_be_marked_is_an_error(self, tmp_path):
        with pytest.raises(SystemCallFailed, match="gone"):
            mark(str(tmp_path / "gone"), "/run/ckptd")

    def test_a_directory_that_no_daemon_has_marked_is_not_judged(self, tmp_path, root):
        [found] = arena_directories(str(tmp_path))
        assert found.live
        assert found.runtime == ""

    def test_other_names_are_not_ours(self, tmp_path):
        for name in ("ckptd", "ckptd-0-x", "ckptd-0-0123456789abc", "other"):
            (tmp_path / name).mkdir()
        assert arena_directories(str(tmp_path)) == []

    @pytest.mark.parametrize(
        ("state", "sealed"), [(SlotState.FREE, 0), (SlotState.SEALED, 1), (SlotState.PERSISTING, 1)]
    )
    def test_what_a_restarted_daemon_could_finish_is_counted(self, tmp_path, root, state, sealed):
        os.close(claim(str(root), "/run/ckptd"))
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
        assert (save.path, save.checkpoint_id) == (str(hidden), str(tmp_path / "run" / "a"))
        assert save.nbytes >= 5000
        assert judge(save) == ""
        assert remove_hidden(save.path)
        assert list((tmp_path / "run").iterdir()) == []
        assert not remove_hidden(save.path)

    def test_what_a_daemon_works_on_stays_whatever_its_age(self, tmp_path, hidden):
        assert judge(look(tmp_path), busy=[str(tmp_path / "run" / "a")]) == "a daemon is working on it"
        assert judge(look(tmp_path), busy=[str(tmp_path / "run" / "b")]) == ""

    def test_what_changed_lately_may_be_another_nodes(self, tmp_path, hidden):
        (hidden / "__1_0.distcp").write_bytes(b"x")
        assert "less than --older-than" in judge(look(tmp_path))
        assert judge(look(tmp_path), older_than_s=0) == ""

    def test_the_only_copy_of_a_checkpoint_stays(self, tmp_path, hidden):
        (hidden / ".metadata").write_bytes(b"x")
        age(hidden)
        reason = judge(look(tmp_path))
        assert reason.startswith(f"holds a whole checkpoint, and {tmp_path}/run/a is not there")
        (tmp_path / "run" / "a").mkdir()
        assert judge(look(tmp_path)) == "", "the one that was replaced goes"

    def test_a_users_own_file_stays_unless_it_has_another_name(self, tmp_path, hidden):
        (hidden / "notes.txt").write_text("x")
        age(hidden)
        assert judge(look(tmp_path)) == "holds a file that is no checkpoint's, notes.txt: move it away first"
        os.link(hidden / "notes.txt", tmp_path / "notes.txt")
        assert judge(look(tmp_path)) == ""

    def test_a_save_that_a_process_has_locked_stays(self, tmp_path, hidden):
        descriptor = os.open(hidden, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        assert judge(look(tmp_path)) == "another process has locked it"
        os.close(descriptor)
        assert judge(look(tmp_path)) == ""

    def test_a_removal_that_was_cut_short_is_finished_later(self, tmp_path, hidden):
        hidden.rename(f"{hidden}.gc")
        save = look(tmp_path)
        assert save.checkpoint_id == str(tmp_path / "run" / "a")
        assert judge(save) == ""
        assert remove_hidden(save.path)
        assert list((tmp_path / "run").iterdir()) == []

    def test_a_commit_that_comes_after_all_finds_nothing_rather_than_half(self, tmp_path, hidden, monkeypatch):
        seen = []
        monkeypatch.setattr("shutil.rmtree", lambda path: seen.append((path, hidden.exists())))
        remove_hidden(str(hidden))
        assert seen == [(f"{hidden}.gc", False)]

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
        with pytest.raises(SystemCallFailed, match=r"__0_0\.distcp: Permission denied"):
            remove_hidden(str(hidden))


def test_a_clock_that_went_backwards_keeps_things():
    save = HiddenSave("/r/.a.ckptd-1", "/r/a", 0, changed_unix_s=2000.0, whole=False, foreign="")
    assert reason_to_keep(save, busy=(), now_unix_s=1000.0, older_than_s=1.0).startswith("changed 0 s ago")
