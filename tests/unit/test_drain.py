"""`drain`: waits for what is under way, and tells what became of each save."""

from __future__ import annotations

import gc
import os
import threading

import pytest

from ckptd.client.drain import drain
from ckptd.client.saving.futures import SaveFuture, open_saves
from ckptd.protocol.errors import DiskFull, Unsupported


@pytest.fixture(autouse=True)
def nothing_open():
    gc.collect()
    assert open_saves() == []
    yield
    gc.collect()


def save(name):
    return SaveFuture(f"/runs/{name}", lambda: None)


def test_nothing_under_way_is_safe_at_once():
    report = drain(60)
    assert report.safe
    assert (report.committed, report.staged, report.unstaged, report.failed) == ((), (), (), ())
    assert report.seconds < 1


def test_each_ends_in_its_own_list():
    saves = [save(name) for name in ("a", "b", "c", "d")]
    for one in saves[:3]:
        one.note_staged(10)
    timer = threading.Timer(0.01, lambda: (saves[0].note_committed(), saves[1].note_failed(DiskFull("/runs", 2, 1))))
    timer.start()
    report = drain(0.05)
    assert (report.committed, report.staged, report.unstaged) == (("/runs/a",), ("/runs/c",), ("/runs/d",))
    [(path, error)] = report.failed
    assert path == "/runs/b"
    assert isinstance(error, DiskFull)
    assert not report.safe
    assert report.seconds >= 0.05
    timer.join()


def test_it_returns_with_the_last_commit():
    one = save("a")
    timer = threading.Timer(0.01, one.note_committed)
    timer.start()
    report = drain(60)
    assert report.safe
    assert report.committed == ("/runs/a",)
    assert report.seconds < 30


def test_one_may_be_content_with_what_the_daemon_has():
    one = save("a")
    one.note_staged(10)
    report = drain(60, until="staged")
    assert report.safe
    assert report.staged == ("/runs/a",)


def test_what_has_ended_is_no_longer_open_and_what_nobody_runs_is_forgotten():
    one, two = save("a"), save("b")
    assert [open_one.checkpoint_id for open_one in open_saves()] == ["/runs/a", "/runs/b"]
    one.note_committed()
    assert open_saves() == [two]
    del two
    gc.collect()
    assert open_saves() == []


def test_a_forked_child_has_none_of_its_parents_saves():
    one = save("a")
    child = os.fork()
    if child == 0:
        os._exit(len(open_saves()))
    assert os.waitpid(child, 0)[1] == 0
    assert open_saves() == [one]


@pytest.mark.parametrize("options", [{"deadline_s": -1}, {"deadline_s": 1e9}, {"deadline_s": 1, "until": "done"}])
def test_what_cannot_be_is_refused(options):
    with pytest.raises(Unsupported):
        drain(**options)
