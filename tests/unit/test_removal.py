"""Removing checkpoints: whole or not at all, and never what somebody reads or pins."""

from __future__ import annotations

import fcntl
import os
import shutil

import pytest
from support.managed import names, write_managed

from ckptd.checkpoint.folder import locks as reading_module
from ckptd.checkpoint.folder import removal
from ckptd.checkpoint.folder.locks import lock_for_removal, reading
from ckptd.checkpoint.folder.pins import is_pinned, pin, unpin
from ckptd.checkpoint.folder.removal import retain
from ckptd.protocol.errors import SystemCallFailed, UnknownCheckpoint
from ckptd.protocol.retention_messages import Keep, RetainTask


def run(root, last=1, busy=()):
    return retain(RetainTask(str(root), Keep(last), list(busy)))


@pytest.fixture
def three(tmp_path):
    for step in (1, 2, 3):
        write_managed(tmp_path, step, committed_s=step)
    return tmp_path


def test_what_is_not_kept_goes_and_leaves_nothing(three):
    assert run(three).removed == ["step-1", "step-2"]
    assert names(three) == ["step-3"]


def test_the_name_goes_first_in_one_step(three, monkeypatch):
    seen = []

    def remove(hidden, **_):
        seen.append((os.path.basename(hidden).rpartition("-")[0], sorted(os.listdir(hidden)), names(three)))

    whole = sorted(os.listdir(three / "step-1"))
    monkeypatch.setattr(shutil, "rmtree", remove)
    run(three, last=2)
    [(hidden, files, left)] = seen
    assert hidden == ".step-1.ckptd-removed"
    assert files == whole
    assert "step-1" not in left


def test_one_that_is_being_read_stays_and_goes_the_next_time(three):
    with reading(str(three / "step-1")):
        done = run(three)
        assert (done.removed, done.held) == (["step-2"], ["step-1"])
        assert (three / "step-1" / ".ckptd").exists()
    assert run(three).removed == ["step-1"]


def test_readers_do_not_hold_each_other(three, monkeypatch):
    monkeypatch.setattr(reading_module.time, "sleep", pytest.fail)
    with reading(str(three / "step-1")), reading(str(three / "step-1")):
        assert lock_for_removal(str(three / "step-1")) is None


def test_a_pipe_in_place_of_the_index_keeps_no_reader_waiting(tmp_path):
    os.mkfifo(tmp_path / ".ckptd")
    with reading(str(tmp_path)):
        assert lock_for_removal(str(tmp_path)) is None


def test_a_reader_that_ended_holds_nothing(three):
    with reading(str(three / "step-1")):
        pass
    os.close(lock_for_removal(str(three / "step-1")))


def test_who_comes_during_a_removal_waits_and_finds_it_gone_or_whole(three, monkeypatch):
    path = str(three / "step-1")
    held = lock_for_removal(path)
    pauses = []

    def pause(seconds):
        pauses.append(seconds)
        os.close(held)  # the removal lets it be, after all

    monkeypatch.setattr(reading_module.time, "sleep", pause)
    with reading(path):
        assert len(pauses) == 1
        assert lock_for_removal(path) is None


def test_a_lock_on_what_was_replaced_meanwhile_is_no_lock(three, monkeypatch):
    path = str(three / "step-1")
    real, swapped = fcntl.flock, []

    def flock(descriptor, kind):
        if not swapped:
            swapped.append(os.rename(path, f"{path}.gone"))
            write_managed(three, 1)
        real(descriptor, kind)

    monkeypatch.setattr(reading_module.fcntl, "flock", flock)
    with reading(path):
        monkeypatch.undo()
        assert lock_for_removal(path) is None
    os.close(lock_for_removal(f"{path}.gone"))


@pytest.mark.parametrize("missing", ["folder", "files"])
def test_where_there_is_nothing_to_lock_nothing_is_locked(tmp_path, missing):
    if missing == "files":
        (tmp_path / "a").mkdir()
    with reading(str(tmp_path / "a")):
        assert lock_for_removal(str(tmp_path / "a")) is None


def test_where_there_are_no_locks_one_reads_but_removes_nothing(three, monkeypatch):
    def flock(descriptor, kind):
        raise OSError(38, "no locks here")

    monkeypatch.setattr(reading_module.fcntl, "flock", flock)
    with reading(str(three / "step-1")):
        pass
    assert run(three).held == ["step-1", "step-2"]


def test_one_that_is_being_saved_again_stays(three):
    assert run(three, busy=["step-1"]).removed == ["step-2"]
    (three / ".step-1.ckptd-job-1-7-0a").mkdir()  # by another job
    assert run(three).removed == []


class TestPins:
    def test_a_pinned_one_stays_until_it_is_unpinned(self, three):
        pin(str(three / "step-1"))
        assert is_pinned(str(three / "step-1"))
        assert run(three).removed == ["step-2"]
        unpin(str(three / "step-1"))
        unpin(str(three / "step-1"))
        assert run(three).removed == ["step-1"]

    def test_a_pin_that_came_between_look_and_lock_counts(self, three, monkeypatch):
        real = removal.lock_for_removal

        def late(path):
            if path.endswith("step-1"):
                pin(path)
            return real(path)

        monkeypatch.setattr(removal, "lock_for_removal", late)
        done = run(three)
        assert (done.removed, done.held) == (["step-2"], ["step-1"])

    def test_only_a_checkpoint_can_be_pinned(self, tmp_path):
        (tmp_path / "a").mkdir()
        for path in ("a", "b"):
            with pytest.raises(UnknownCheckpoint):
                pin(str(tmp_path / path))


def test_what_a_killed_removal_left_is_swept(three):
    (three / "step-1").rename(three / ".step-1.ckptd-removed-0a1b2c3d")
    (three / ".step-1.ckptd-removed-0a1b2c3d" / "__0_0.distcp").unlink()
    run(three, last=3)
    assert names(three) == ["step-2", "step-3"]


def test_what_cannot_be_removed_is_told_and_the_rest_goes(three, monkeypatch):
    real = os.rename

    def rename(old, new):
        if str(old).endswith("step-1"):
            raise PermissionError(13, "no")
        real(old, new)

    monkeypatch.setattr(removal.os, "rename", rename)
    done = run(three)
    assert done.removed == ["step-2"]
    assert "step-1" in done.errors[0]
    assert (three / "step-1" / ".ckptd").exists()


def test_a_file_that_cannot_be_removed_is_told(three, monkeypatch):
    real = os.unlink

    def unlink(path, **options):
        if path == "__0_0.distcp":
            raise PermissionError(13, "Permission denied")
        real(path, **options)

    monkeypatch.setattr(os, "unlink", unlink)
    done = run(three, last=2)
    assert done.removed == ["step-1"]
    assert "Permission denied" in done.errors[0]


def test_two_removers_at_one_leftover_do_not_trip_each_other(three, monkeypatch):
    left = three / ".step-1.ckptd-removed-0a"
    (three / "step-1").rename(left)
    real = os.unlink

    def unlink(path, **options):
        monkeypatch.setattr(os, "unlink", real)
        shutil.rmtree(left)  # the other one is faster
        real(path, **options)

    monkeypatch.setattr(os, "unlink", unlink)
    assert run(three, last=3).errors == []
    assert names(three) == ["step-2", "step-3"]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(SystemCallFailed, match="scandir"):
        run(tmp_path / "nowhere")
