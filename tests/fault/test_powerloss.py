"""The power may fail at any moment of a save: the id then shows the old checkpoint or the new one, whole.

Real workers save while strace records them; a model of a disk then loses what was not synced, in every combination that
it may, after every single call. The model finds what is left out: each fsync in turn is dropped from the recording.
"""

from __future__ import annotations

import pytest
from support.nursery import state
from support.powerloss import Recording, Rename, Sync, Write, record, snapshot
from support.sabotage import sabotage
from support.savedsteps import RecordedSave
from support.strace import lines, traced
from support.trees import below
from support.waiting import wait_until

from ckptd.checkpoint.names import split_hidden
from ckptd.checkpoint.publishing.leftovers import sweep

# What is saved: below which folder of the root, over what, and what strace lets fail meanwhile.
KINDS = {
    "first": {},
    "first in new folders": {"folders": "x/y"},
    "first, its last sync fails": {"inject": ["fsync:error=EIO:when=5"], "fails": True},
    "first in new folders, whose maker dies": {"folders": "x/y", "dies": "before_sync"},
    "over": {"over": True},
    "over a user's files": {"over": True, "foreign": True},
    "over, no exchange of names": {"over": True, "inject": ["renameat2:error=EINVAL"]},
    "over, its worker dies": {"over": True, "dies": "before_publish"},
    "over, its worker dies in the middle of the exchange": {"over": True, "dies": "after_exchange"},
    "over, its worker dies behind it": {"over": True, "foreign": True, "dies": "after_publish"},
    "over, its last sync fails": {"over": True, "inject": ["fsync:error=EIO:when=6"], "fails": True},
}


@pytest.fixture
def recorded(start_daemon, client, tmp_path):
    """Record a save of a kind, made by a worker that has saved beside it before."""

    def make(kind):
        options = KINDS[kind]
        environment, dead = {}, None
        if moment := options.get("dies"):
            environment = sabotage(tmp_path, moment, times=1)
            dead = tmp_path / f"sabotage-{moment}" / "died-0"
            dead.touch()  # not yet
        daemon = start_daemon(write_threads=2, write_chunk_bytes=256 << 10, environment=environment)
        root, log = tmp_path / "root", tmp_path / "calls.log"
        path = root / options.get("folders", "") / "a"
        client.save(state(), checkpoint_id=root / "warm")
        if options.get("over"):
            client.save(state(), checkpoint_id=path)
        if options.get("foreign"):
            (path / "logs").mkdir()
            for name in ("notes.txt", "logs/events"):
                (path / name).write_text("mine")
        [worker] = daemon.workers()
        save = RecordedSave(str(path), snapshot(root), fails=options.get("fails", False))
        save.keep_contents(save.steps.before)
        if dead:
            dead.unlink()
        with traced([worker, daemon.pid], log, inject=options.get("inject", [])):
            error = client.async_save(state(value=2.0), checkpoint_id=path).exception(30)
            assert (error is not None) is save.fails, error
            wait_until(lambda: not below(root, ".*.ckptd-*"), "no leftovers")
        assert dead is None or dead.exists()
        save.take(record(save.steps, [text for _, text in lines(log)]))
        return save

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_no_power_failure_tears_a_checkpoint(recorded, kind):
    save = recorded(kind)
    assert sum(isinstance(step, Write) for step in save.steps.steps) >= 7
    assert sum(isinstance(step, Sync) for step in save.steps.steps) >= 5
    assert save.faults() == []
    if not save.fails:  # whose files are gone, so that there are no contents to read
        seen = save.compare_with_readers()
        assert set(seen) <= {"new", "old", "nothing"}
        assert seen[save.before] > 10
        assert seen["new"] > 0


@pytest.mark.parametrize(
    ("kind", "forgotten"),
    [
        *[("first", name) for name in ("__0_0.distcp", ".ckptd", ".metadata", "hidden", "root")],
        *[("first in new folders", name) for name in ("root", "x", "y")],
        *[("first in new folders, whose maker dies", name) for name in ("root", "x", "y")],
        ("over, its worker dies in the middle of the exchange", "root"),
        *[("over", name) for name in ("__0_0.distcp", ".ckptd", ".metadata", "hidden", "root")],
        *[("over a user's files", name) for name in ("hidden", "logs", "root")],
        ("over, no exchange of names", "root"),
        ("over, its last sync fails", "root"),
        ("first, its last sync fails", "root"),
    ],
)
def test_the_model_finds_what_is_not_synced(recorded, kind, forgotten):
    save = recorded(kind)
    numbers = save.syncs(forgotten)
    assert numbers
    assert save.faults(save.steps.without(*numbers))


def test_the_model_finds_a_name_that_is_given_too_early(recorded):
    save = recorded("first")
    steps = save.steps.steps
    [publish] = [n for n, step in enumerate(steps) if isinstance(step, Rename) and len(step.changes) == 2]
    last = save.syncs(".metadata")[0]
    early = [*steps[:last], steps[publish], *steps[last:publish], *steps[publish + 1 :]]
    faults = save.faults(Recording(save.steps.root, save.steps.before, early))
    assert {shown for _, shown in faults} == {"torn"}


def test_what_waits_between_two_renames_gets_its_name_back(recorded, tmp_path):
    save = recorded("over, no exchange of names")
    restored = 0
    for count in range(len(save.steps.steps) + 1):
        for disk in (save.steps.all_lost(count), save.steps.all_kept(count)):
            if save.shows(disk) == "nothing":
                place = tmp_path / f"restored-{restored}"
                save.materialize(disk, place)
                dead = {parts[1] for path in place.iterdir() if (parts := split_hidden(str(path)))}
                assert sweep(str(place), dead).named_back
                assert save.read(place) == "old"
                assert sorted(path.name for path in place.iterdir()) == ["a", "warm"]
                restored += 1
    assert restored
