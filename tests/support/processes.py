"""Other processes, seen from outside: which belong to a runtime directory, when they end, what they have mapped."""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from support.waiting import PATIENCE_S, wait_readable, wait_until


def processes_of(runtime):
    """Return the pids of the daemons and workers that were started with this runtime directory."""
    wanted = f"CKPTD_RUNTIME_DIR={runtime}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # it has just ended
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return sorted(found)


def is_daemon(pid):
    """Say whether a process is a daemon, not one of its workers."""
    with suppress(OSError):
        return b"ckptd.daemon" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return False


def wait_gone(pid, *, timeout_s=PATIENCE_S):
    """Wait until a process has ended, whoever reaps it."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        wait_readable(descriptor, f"the end of pid {pid}", timeout_s=timeout_s)
    finally:
        os.close(descriptor)


def is_stopped(pid):
    """Say whether all of a process is stopped: SIGSTOP is delivered some time after kill(2) returns."""
    return psutil.Process(pid).status() == psutil.STATUS_STOPPED


@contextmanager
def stopped(*pids):
    """Keep processes stopped; those that still live go on at the end."""
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        for pid in pids:
            wait_until(lambda pid=pid: is_stopped(pid), f"pid {pid} stopped")
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def kill(pid, number=signal.SIGKILL):
    """Send a signal and wait until the process has ended."""
    os.kill(pid, number)
    wait_gone(pid)
