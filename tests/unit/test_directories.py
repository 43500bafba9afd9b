"""A daemon's directories: one daemon in each, and what dead ones have left is found and told from what is in use."""

from __future__ import annotations

import os

import pytest

from ckptd.daemon.recovery.directories import Directories
from ckptd.daemon.recovery.journal import Journal
from ckptd.protocol.errors import SystemCallFailed
from ckptd.staging.arena import create_arena, hold, let_go


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Make directories below the test's own, by the name of the runtime directory."""
    monkeypatch.setenv("CKPTD_STATE_DIR", str(tmp_path / "state"))
    (tmp_path / "shm").mkdir()
    made = []

    def make(name="run"):
        made.append(Directories(str(tmp_path / name), str(tmp_path / "shm"), everyone=False))
        return made[-1]

    yield make
    for directories in made:
        directories.release()


def arena_below(root):
    os.mkdir(f"{root}/job-1")
    return create_arena(f"{root}/job-1/rank-0-1.arena", slots=1, slot_bytes=8192)


def test_a_second_daemon_in_the_same_place_is_refused(place):
    first = place()
    with pytest.raises(SystemCallFailed, match="run"):
        place()
    first.release()
    place()


def test_another_runtime_directory_has_another_root_and_journal(place):
    one, other = place("one"), place("other")
    assert one.root != other.root
    assert one.state != other.state
    assert os.path.dirname(one.state) == os.path.dirname(other.state)


def test_the_same_place_has_the_same_root_and_journal_again(place):
    first = place()
    first.release()
    second = place()
    assert (first.root, first.state) == (second.root, second.state)


def test_only_journals_of_the_dead_are_found(place):
    dead, living, own = place("dead"), place("living"), place("own")
    for directories in (dead, living, own):
        Journal(directories.state).close()
    dead.release()
    assert list(own.journals_of_the_dead()) == [dead.state]


def test_a_journal_is_locked_while_it_is_looked_into(place):
    dead, own, third = place("dead"), place("own"), place("third")
    Journal(dead.state).close()
    dead.release()
    for directory in own.journals_of_the_dead():
        assert directory == dead.state
        assert list(third.journals_of_the_dead()) == []
    assert list(third.journals_of_the_dead()) == [dead.state]


def test_the_root_is_cleared_of_what_is_not_kept(place):
    own = place()
    for name in ("job-1", "job-2"):
        os.mkdir(f"{own.root}/{name}")
    own.clear_root({f"{own.root}/job-2"})
    assert os.listdir(own.root) == ["job-2"]


class TestOrphans:
    """Roots of other daemons on the same tmpfs."""

    def test_a_dead_daemons_root_that_nobody_uses_is_reclaimed(self, place):
        dead, own = place("dead"), place("own")
        os.close(arena_below(dead.root))
        dead.release()
        assert own.reclaim_orphans(set(), older_than_s=0) == [dead.root]
        assert not os.path.exists(dead.root)

    def test_a_living_daemons_root_is_not(self, place):
        living, own = place("living"), place("own")
        os.close(arena_below(living.root))
        assert own.reclaim_orphans(set(), older_than_s=0) == []
        assert os.path.exists(living.root)

    def test_one_whose_trainer_lives_is_not(self, place):
        dead, own = place("dead"), place("own")
        descriptor = arena_below(dead.root)
        mark = hold(descriptor)
        os.close(descriptor)
        dead.release()
        assert own.reclaim_orphans(set(), older_than_s=0) == []
        let_go(mark)
        assert own.reclaim_orphans(set(), older_than_s=0) == [dead.root]

    def test_one_that_was_changed_of_late_is_not(self, place):
        dead, own = place("dead"), place("own")
        os.close(arena_below(dead.root))
        dead.release()
        assert own.reclaim_orphans(set(), older_than_s=3600) == []

    def test_one_whose_jobs_we_have_taken_up_is_not(self, place):
        dead, own = place("dead"), place("own")
        os.close(arena_below(dead.root))
        dead.release()
        assert own.reclaim_orphans({f"{dead.root}/job-1"}, older_than_s=0) == []

    def test_strangers_on_the_tmpfs_are_left_alone(self, place, tmp_path):
        own = place()
        (tmp_path / "shm" / "somebody-else").mkdir()
        assert own.reclaim_orphans(set(), older_than_s=0) == []


def test_without_a_writable_home_the_journal_lies_with_the_sockets(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("CKPTD_STATE_DIR", raising=False)
    (tmp_path / "file").touch()
    monkeypatch.setattr("ckptd.daemon.recovery.directories.state_dir", lambda: str(tmp_path / "file" / "below"))
    (tmp_path / "shm").mkdir()
    directories = Directories(str(tmp_path / "run"), str(tmp_path / "shm"), everyone=False)
    assert directories.state.startswith(str(tmp_path / "run" / "state"))
    assert "set CKPTD_STATE_DIR" in caplog.text
    directories.release()


def test_a_state_directory_that_was_asked_for_must_be_there(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "shm").mkdir()
    monkeypatch.setenv("CKPTD_STATE_DIR", str(tmp_path / "file" / "below"))
    with pytest.raises(SystemCallFailed, match="below"):
        Directories(str(tmp_path / "run"), str(tmp_path / "shm"), everyone=False)
    # Nothing is held afterwards.
    monkeypatch.setenv("CKPTD_STATE_DIR", str(tmp_path / "state"))
    Directories(str(tmp_path / "run"), str(tmp_path / "shm"), everyone=False).release()


def test_an_emptied_place_leaves_nothing_on_tmpfs(place, tmp_path):
    directories = place()
    os.mkdir(f"{directories.root}/job-1")
    directories.release(emptied=True)
    assert list((tmp_path / "shm").iterdir()) == []
