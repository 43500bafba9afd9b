"""`ckptd gc`: asks daemons and people before it deletes."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time

import pytest

from ckptd.daemon.cli import gc
from ckptd.daemon.recovery.directories import name_for
from ckptd.protocol.errors import DaemonUnavailable
from ckptd.staging.arena import SlotState, create_arena, hold, let_go, write_slot_state


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A tmpfs with a dead daemon's arenas, and a folder with an old unfinished save."""
    monkeypatch.setenv("CKPTD_RUNTIME_DIR", str(tmp_path / "run"))
    dead = tmp_path / "shm" / "ckptd-0-0123456789ab"
    dead.mkdir(parents=True)
    hidden = tmp_path / "runs" / ".a.ckptd-1"
    hidden.mkdir(parents=True)
    (hidden / "__0_0.distcp").write_bytes(b"x")
    for path in (hidden / "__0_0.distcp", hidden):
        os.utime(path, (time.time() - 7200,) * 2)
    return tmp_path


@pytest.fixture
def run(run_cli, place):
    return lambda *words: run_cli("gc", place / "runs", "--shm-dir", place / "shm", *words)


def left(place):
    return sorted(path.name for folder in ("shm", "runs") for path in (place / folder).iterdir())


OWN = f"/run/user/{os.geteuid()}/ckptd"
LIVE = f"ckptd-{os.geteuid()}-{name_for(OWN)}"
BOTH = [".a.ckptd-1", "ckptd-0-0123456789ab"]


def test_leftovers_go_when_told(run, place):
    code, out, err = run("--yes")
    assert (code, err, left(place)) == (0, "", [])
    assert f"{place}/runs/.a.ckptd-1: " in out
    assert out.splitlines()[-1].startswith("settled 2 leftovers, ")
    assert run("--yes")[1] == "nothing is left over\n"


def test_a_dry_run_deletes_nothing(run, place):
    code, out, _ = run("--dry-run")
    assert (code, left(place)) == (0, BOTH)
    assert out.splitlines()[-1].startswith("would settle 2 leftovers, ")


def test_with_nobody_to_ask_nothing_is_deleted(run, place, monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    code, _, err = run()
    assert (code, left(place)) == (1, BOTH)
    assert err == "ckptd: gc: 2 leftovers, and nobody to ask; add --yes to delete, or --dry-run\n"


@pytest.mark.parametrize(("answer", "code", "stays"), [("y\n", 0, []), ("n\n", 1, BOTH), ("\n", 1, BOTH)])
def test_a_person_is_asked(run, place, monkeypatch, answer, code, stays):
    asked = []

    def confirm(text, *, abort):
        asked.append((text, abort))
        if answer != "y\n":
            raise gc.typer.Abort

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(gc.typer, "confirm", confirm)
    assert run()[0] == code
    assert left(place) == stays
    [(text, abort)] = asked
    assert text.startswith("Delete these 2 leftovers, ")
    assert abort


def test_as_json(run, place):
    code, out, _ = run("--yes", "--json")
    facts = json.loads(out)
    assert code == 0
    assert sorted(os.path.basename(path) for path in facts["removed"]) == BOTH
    assert {one["kind"]: one["keep"] for one in facts["left"]} == {"arenas": None, "save": None}
    assert run("--json")[0] == 2, "JSON asks nobody"


def test_sealed_saves_of_a_dead_daemon_are_kept_for_its_successor(run, place):
    arena = create_arena(str(place / "shm" / BOTH[1] / "x.arena"), slots=1, slot_bytes=4096)
    write_slot_state(arena, 0, SlotState.SEALED)
    os.close(arena)
    _, out, _ = run("--yes")
    assert left(place) == BOTH, "nor is the directory that the save was writing"
    assert "holds 1 sealed saves" in out
    assert "a daemon that is started again may finish it" in out
    run("--yes", "--sealed")
    assert left(place) == []


def test_arenas_that_trainers_hold_are_kept_whatever_is_said(run, place):
    arena = create_arena(str(place / "shm" / BOTH[1] / "x.arena"), slots=1, slot_bytes=4096)
    held = hold(arena)
    os.close(arena)
    _, out, _ = run("--yes", "--sealed")
    assert left(place) == [BOTH[1]]
    assert "kept: trainers live that wait for its next daemon" in out
    let_go(held)


def status_of(checkpoint_id, state):
    save = {"checkpoint_id": checkpoint_id, "state": state}
    return json.dumps({"jobs": [{"generations": [save]}]}).encode()


@pytest.fixture
def live(place):
    """A live daemon of this node, found by its arenas."""
    live = place / "shm" / LIVE
    live.mkdir()
    lock = os.open(live, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield OWN
    os.close(lock)


@pytest.mark.parametrize(("state", "stays"), [("staged", True), ("committing", True), ("failed", False)])
def test_every_live_daemon_is_asked_what_it_works_on(run, place, live, monkeypatch, state, stays):
    asked = []

    def fetch(runtime):
        asked.append(runtime)
        return status_of(str(place / "runs" / "a"), state)

    monkeypatch.setattr(gc, "fetch_status", fetch)
    run("--yes", "--older-than", "0")
    assert live in asked
    assert (BOTH[0] in left(place)) == stays
    assert LIVE in left(place)


def test_a_daemon_that_lives_but_does_not_answer_keeps_every_save(run, place, live, monkeypatch):
    def fetch(runtime):
        raise DaemonUnavailable(runtime, "hangs")

    monkeypatch.setattr(gc, "fetch_status", fetch)
    _, out, _ = run("--yes")
    assert BOTH[0] in left(place)
    assert f"the daemon at {OWN} lives but cannot be asked" in out
    assert BOTH[1] not in left(place), "a dead daemon's arenas go all the same"


def test_another_users_daemon_that_does_not_answer_keeps_only_that_users(run, place, monkeypatch):
    theirs = place / "shm" / f"ckptd-4711-{name_for('/run/user/4711/ckptd')}"
    theirs.mkdir()
    lock = os.open(theirs, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    run("--yes")
    assert left(place) == [theirs.name]
    os.close(lock)


def test_what_cannot_be_removed_is_one_line_and_1(run, place, monkeypatch):
    def rmtree(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("shutil.rmtree", rmtree)
    code, _, err = run("--yes")
    assert code == 1
    assert err.count("Permission denied") == err.count("\n") == 2


def test_a_folder_that_is_not_there_is_one_line(run_cli, place):
    code, _, err = run_cli("gc", place / "gone", "--shm-dir", place / "shm", "--yes")
    assert (code, err.count("\n")) == (1, 1)
    assert "No such file or directory" in err
