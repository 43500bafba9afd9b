"""A storage writer that runs in a worker: each of its calls on files fails once, as in test_system_calls.py.

The writer is ckptd's own, with an option that the daemon's workers do not know, so that it is handed over.
"""

import errno
import os

import pytest
import torch
from support.clients import stock_load
from support.daemons import Daemon, Runtime
from support.strace import lines, traced
from support.waiting import wait_until

import ckptd.client
from ckptd.client.session import sessions

# Which of a thread's calls fails, of those that a save of four files makes.
CALLS = {
    "openat": (1, 2, 3, 5, 8, 13),
    "mkdir": (1, 2),
    "fallocate": (1, 2, 3),
    "pwrite64": (1, 2, 3, 5, 8),
    "write": (1, 2),
    "ftruncate": (1, 2, 3),
    "fsync": (1, 2, 3, 5, 8),
    "renameat2": (1, 2),
    "unlinkat": (1, 2, 3, 5),
}
NAMES = ("a", "b", "c", "d")


def state(value):
    return {name: torch.full((3000,), value) for name in NAMES}


def save(path, value):
    writer = ckptd.client.FileSystemWriter(path, single_file_per_rank=False, thread_count=1)
    return ckptd.client.async_save(state(value), storage_writer=writer)


def load(found, path):
    ckptd.client.load(found, checkpoint_id=str(path))


def assert_holds(path, value):
    for loaded_by in (load, stock_load):
        found = state(-1.0)
        loaded_by(found, path)
        assert all(torch.equal(found[name], tensor) for name, tensor in state(value).items())


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    """One daemon, and its worker for users' code, for all tests."""
    runtime = Runtime()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**runtime.environment, "CKPTD_EMBEDDED": "0"}.items():
            patch.setenv(name, value)
        daemon = Daemon(runtime)
        try:
            save(tmp_path_factory.mktemp("first") / "a", 0.0).result(60)
            yield daemon
        finally:
            sessions.close_all()
            daemon.stop()
            runtime.close()


@pytest.mark.parametrize("fault", ["EIO", "ENOSPC"])
@pytest.mark.parametrize(("call", "number"), [(call, number) for call, numbers in CALLS.items() for number in numbers])
def test_a_call_that_fails_once(daemon, tmp_path, call, fault, number):
    path, log = tmp_path / "root" / "a", tmp_path / "calls.log"
    save(path, 1.0).result(30)
    (path / "notes.txt").write_text("mine")
    with traced(daemon.workers(2), log, calls=call, inject=[f"{call}:error={fault}:when={number}"]):
        error = save(path, 2.0).exception(30)
    assert any("INJECTED" in text for _, text in lines(log))
    if error is not None:
        assert os.strerror(getattr(errno, fault)) in str(error)
    assert_holds(path, 1.0 if error else 2.0)
    assert (path / "notes.txt").read_text() == "mine"
    wait_until(lambda: [entry.name for entry in path.parent.iterdir()] == ["a"], "no leftovers")
    save(path, 3.0).result(30)
    assert_holds(path, 3.0)
    assert [entry.name for entry in path.parent.iterdir()] == ["a"]
