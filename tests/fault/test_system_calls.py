"""Every system call that a save makes on files fails once, at its first, middle and last time, in a real worker.

Afterwards the id shows the old checkpoint or the new one, whole; the future says which, and if the old one, why;
nothing is left over; and the next save works. One daemon and one worker live through all of it, unless the worker is
killed on purpose.
"""

from __future__ import annotations

import collections
import errno
import os
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from support.clients import assert_holds
from support.daemons import Daemon, Runtime
from support.nursery import state
from support.strace import lines, traced
from support.waiting import wait_until

import ckptd.client
from ckptd.checkpoint.names import split_hidden
from ckptd.checkpoint.publishing.leftovers import sweep
from ckptd.client.session import sessions

ERRORS = ("EIO", "ENOSPC", "EDQUOT", "EINTR")
POSITIONS = ("first", "middle", "last")
ALL_CASES = bool(os.environ.get("CKPTD_ALL_FAULTS"))  # make faults
# What fails; the first column of the table below. Writes can also take nothing of what they are given.
CALLS = {
    "openat": ERRORS,
    "mkdir": ERRORS,
    "fallocate": (*ERRORS, "EOPNOTSUPP"),
    "pwrite64": (*ERRORS, "nothing written"),
    "write": (*ERRORS, "nothing written"),
    "fsync": ERRORS,
    "close": ("EIO", "EINTR"),
    "renameat2": ERRORS,
    "rename": ERRORS,  # where two names cannot be exchanged
    "unlink": ERRORS,
    "unlinkat": ERRORS,
    "rmdir": ERRORS,
}
# What a save outlives: the call is made again, or another one in its place, or it has not mattered.
HARMLESS = {
    *((call, "EINTR") for call in ("openat", "fallocate", "pwrite64", "write", "fsync", "close")),
    ("fallocate", "EOPNOTSUPP"),
    *((call, "nothing written") for call in ("pwrite64", "write")),
    *((call, error) for call in ("unlink", "unlinkat", "rmdir") for error in ERRORS),
}


# Removals are made only of what is replaced.
OVER = dict.fromkeys(("unlink", "unlinkat", "rmdir"), (True,))
KILLED_AT = ("mkdir", "openat", "fsync", "renameat2", "rename", "unlinkat", "rmdir")


@dataclass(frozen=True)
class Case:
    """One fault. ``over``: the id has a checkpoint before."""

    call: str
    fault: str
    position: str
    over: bool

    def __str__(self):
        return f"{self.call}-{self.fault}-{self.position}-{'over' if self.over else 'new'}".replace(" ", "_")


def cases(calls):
    """Return all combinations, or a third: each call and fault, over each, at one of the positions in turn."""
    found = []
    for row, (call, faults) in enumerate(calls.items()):
        for column, fault in enumerate(faults):
            for turn, position in enumerate(POSITIONS):
                if ALL_CASES or (row + column + turn) % len(POSITIONS) == 0:
                    found += [Case(call, fault, position, over) for over in OVER.get(call, (False, True))]
    return [pytest.param(case, id=str(case)) for case in found]


class Saving:
    """A daemon with one worker, a session, and how often a save makes each call."""

    def __init__(self, daemon, directory):
        self.daemon, self.directory = daemon, directory
        self._values = iter(range(1, 1 << 20))
        self._counts = {}

    def save(self, path):
        """Save values that no save before had; return the value and the future."""
        value = float(next(self._values))
        return value, ckptd.client.async_save(state(value=value), checkpoint_id=path)

    def save_new_structure(self, path):
        """Save what must be planned anew; return the future."""
        return ckptd.client.async_save({f"w{next(self._values)}": torch.ones(1000)}, checkpoint_id=path)

    def saved(self, path):
        """Save and return the value."""
        value, future = self.save(path)
        future.result(30)
        return value

    def count(self, call, *, over):
        """Return how often a save makes a call, by a look at one, and by the thread that makes most of them."""
        plain = call == "rename"
        if (over, plain) not in self._counts:
            log, path = self.directory / f"count-{over}-{plain}.log", self.directory / f"count-{over}-{plain}"
            if over:
                self.saved(path)
            with traced(self.worker, log, calls="all", inject=without_exchange(call)):
                self.saved(path)
            found = collections.Counter((thread, text.partition("(")[0]) for thread, text in lines(log))
            self._counts[over, plain] = found
        return max((n for (_, name), n in self._counts[over, plain].items() if name == call), default=0)

    @property
    def worker(self):
        [pid] = self.daemon.workers()
        return pid


def without_exchange(call):
    """Return the fault that takes renameat2 away, if it is plain renames that are looked at."""
    return ["renameat2:error=EINVAL"] if call == "rename" else []


@pytest.fixture(scope="module")
def saving(tmp_path_factory):
    runtime, directory = Runtime(), tmp_path_factory.mktemp("saving")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**runtime.environment, "CKPTD_EMBEDDED": "0"}.items():
            patch.setenv(name, value)
        daemon = Daemon(runtime, write_threads=1, write_chunk_bytes=128 << 10, work_attempts=2)
        try:
            saving = Saving(daemon, directory)
            saving.saved(directory / "first")
            yield saving
        finally:
            sessions.close_all()
            daemon.stop()
            runtime.close()


def injection(case, saving):
    """Return what strace is to do, or skip where a save makes no such call."""
    count = saving.count(case.call, over=case.over)
    assert count, "no such call in a save"
    if ALL_CASES and case.position in {1: ("middle", "last"), 2: ("middle",)}.get(count, ()):
        pytest.skip(f"{count} such calls in a save: it is the first one")
    when = {"first": 1, "middle": (count + 1) // 2, "last": count}[case.position]
    fault = {"nothing written": "retval=0", "killed": "signal=KILL"}.get(case.fault, f"error={case.fault}")
    return [*without_exchange(case.call), f"{case.call}:{fault}:when={when}"]


def names(directory):
    return sorted(path.name for path in directory.iterdir() if not path.name.endswith(".log"))


def is_concerned(path, directory, arenas):
    """Say whether a path is one of this save's: below or above its directory, or where it was staged."""
    return any(Path(path).is_relative_to(place) for place in (directory, arenas)) or directory.is_relative_to(path)


def descriptors(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.parametrize("case", cases(CALLS))
def test_a_call_that_fails_once(case, saving, tmp_path):
    path, log, worker = tmp_path / "a", tmp_path / "calls.log", saving.worker
    faults = injection(case, saving)
    old = saving.saved(path) if case.over else None
    if case.over:
        (path / "notes.txt").write_text("mine")
    open_before = descriptors(worker)
    with traced(worker, log, calls=f"{case.call},renameat2", inject=faults):
        new, future = saving.save(path)
        error = future.exception(30)
        wait_until(lambda: names(tmp_path) == (["a"] if case.over or not error else []), f"no leftovers ({error})")
    assert any("INJECTED" in text and text.startswith(case.call) for _, text in lines(log))
    if error is None:
        assert_holds(path, value=new)
    else:
        assert (case.call, case.fault) not in HARMLESS
        assert error.errno == getattr(errno, case.fault)
        assert is_concerned(error.path, tmp_path, saving.daemon.runtime.arenas)
        assert os.strerror(error.errno) in str(error)
        assert error.path in str(error)
        if case.over:
            assert_holds(path, value=old)
    assert not case.over or (path / "notes.txt").read_text() == "mine"
    assert saving.worker == worker
    if case.call != "close":  # which is not done at all, where strace lets it fail
        wait_until(lambda: descriptors(worker) == open_before, "all files closed")
    assert_holds(path, value=saving.saved(path))
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("case", cases({call: ["killed"] for call in KILLED_AT}))
def test_a_worker_killed_at_a_call(case, saving, tmp_path):
    path, log, worker = tmp_path / "a", tmp_path / "calls.log", saving.worker
    faults = injection(case, saving)
    if case.over:
        saving.saved(path)
        (path / "notes.txt").write_text("mine")
    with traced(worker, log, calls=f"{case.call},renameat2", inject=faults):
        new, future = saving.save(path)
        future.result(30)
    assert saving.worker != worker
    assert_holds(path, value=new)
    assert not case.over or (path / "notes.txt").read_text() == "mine"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("fault", ["EIO", "ENOSPC"])
@pytest.mark.parametrize("call", ["openat", "write", "rename"])
def test_a_plan_that_cannot_be_kept(saving, tmp_path, call, fault):
    """The first save of a structure writes its plan for all workers, on tmpfs."""
    log = tmp_path / "calls.log"
    with traced(saving.worker, log, calls=call, inject=[f"{call}:error={fault}:when=1"]):
        error = saving.save_new_structure(tmp_path / "a").exception(30)
    assert (error.errno, error.call) == (getattr(errno, fault), "write")
    assert Path(error.path).is_relative_to(saving.daemon.runtime.arenas)
    assert names(tmp_path) == []
    saving.save_new_structure(tmp_path / "a").result(30)
    assert_holds(tmp_path / "b", value=saving.saved(tmp_path / "b"))


def test_a_write_that_the_kernel_cuts_short(saving, tmp_path):
    """At a limit in the middle of a chunk the kernel writes a part, which is continued, and then refuses the rest."""
    path, process = tmp_path / "a", psutil.Process(saving.worker)
    old, before = saving.saved(path), process.rlimit(psutil.RLIMIT_FSIZE)
    with traced(process.pid, tmp_path / "calls.log", inject=["fallocate:error=EOPNOTSUPP"]):
        process.rlimit(psutil.RLIMIT_FSIZE, (300 << 10, before[1]))
        try:
            _, future = saving.save(path)
            error = future.exception(30)
        finally:
            process.rlimit(psutil.RLIMIT_FSIZE, before)
    written = [text.rpartition(" = ")[2] for _, text in lines(tmp_path / "calls.log") if text.startswith("pwrite64")]
    assert written[:4] == [str(128 << 10), str(128 << 10), str(44 << 10), "-1 EFBIG (File too large)"]
    assert (error.call, error.errno) == ("pwrite", errno.EFBIG)
    assert_holds(path, value=old)
    assert_holds(path, value=saving.saved(path))
    wait_until(lambda: names(tmp_path) == ["a"], "no leftovers")


def test_a_disk_that_refuses_every_sync(saving, tmp_path):
    """Whatever is tried, nothing is published, and what an id shows is not touched."""
    path = tmp_path / "a"
    old = saving.saved(path)
    with traced(saving.worker, tmp_path / "calls.log", inject=["fsync:error=EIO"]):
        _, future = saving.save(path)
        assert future.exception(30).errno == errno.EIO
        wait_until(lambda: names(tmp_path) == ["a"], "no leftovers")
    assert_holds(path, value=old)
    assert_holds(path, value=saving.saved(path))


def test_a_name_that_cannot_be_made_durable_is_taken_back(saving, tmp_path):
    """Nobody knows then which of the two a power failure would leave under the id, so both stay until it is durable."""
    path = tmp_path / "a"
    old = saving.saved(path)
    syncs = saving.count("fsync", over=True)
    with traced(saving.worker, tmp_path / "calls.log", inject=[f"fsync:error=EIO:when={syncs}+"]):
        _, future = saving.save(path)
        error = future.exception(30)
        wait_until(lambda: f"could not remove {tmp_path}/.a" in saving.daemon.log(), "the attempt to remove it")
    assert (error.call, error.errno, error.path) == ("fsync", errno.EIO, str(tmp_path))
    assert_holds(path, value=old)
    [hidden] = [name for name in names(tmp_path) if name != "a"]
    _, save_id, _ = split_hidden(str(tmp_path / hidden))
    assert sweep(str(tmp_path), {save_id}).removed == [str(tmp_path / hidden)]
    assert_holds(path, value=old)
    assert_holds(path, value=saving.saved(path))
    assert names(tmp_path) == ["a"]
