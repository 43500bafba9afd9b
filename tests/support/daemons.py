"""Daemons as the tests start them: real processes, each in a runtime directory of its own, looked after to the end."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.processes import is_daemon, processes_of, wait_gone
from support.trees import below
from support.waiting import PATIENCE_S, wait_readable, wait_until

from ckptd.client.session import sessions

# Faster than the defaults, slower than a busy machine's hiccups; workers at nice 19 would starve beside other tests.
SETTINGS = {
    **{"heartbeat_s": 0.2, "session_timeout_s": 10.0, "progress_timeout_s": 20.0},
    **{"worker_nice": 0, "retain_s": 0.0},
}
_STOP_S = 15.0


class Runtime:
    """A runtime directory and what must not outlive it.

    Attributes:
        path: The directory; short, because a socket's name has 107 bytes at most.
        watched: Directories in which no hidden directory of an unfinished save may be left.
    """

    def __init__(self):
        self.path = tempfile.mkdtemp(prefix="ck", dir="/tmp")
        self.watched = []
        self.daemon_was_killed = False
        self.sessions_wait = False  # a daemon was stopped whose clients go on waiting for the next one
        self.shm_dir = "/dev/shm"

    @property
    def arenas(self):
        """The daemon's directory on tmpfs."""
        where = hashlib.blake2s(self.path.encode(), digest_size=6).hexdigest()
        return Path(self.shm_dir, f"ckptd-{os.geteuid()}-{where}")

    def journals(self):
        """The directory of the daemons' journals."""
        return Path(self.path, "state")

    @property
    def environment(self):
        """Variables for processes that use this directory."""
        return {"CKPTD_RUNTIME_DIR": self.path, "CKPTD_STATE_DIR": f"{self.path}/state"}

    def configure(self, **settings):
        """Write the configuration and return its path."""
        path = Path(self.path, "config.toml")
        self.shm_dir = settings.get("shm_dir", self.shm_dir)
        lines = [f"{name} = {json.dumps(value)}" for name, value in {**SETTINGS, **settings}.items()]
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    def litter(self):
        """Return the hidden directories of saves that were neither published nor removed."""
        return [str(path) for root in self.watched for path in below(root, ".*.ckptd-*")]

    def close(self):
        """End what still runs here and complain about everything that was left behind."""
        running = processes_of(self.path)
        for pid in filter(is_daemon, running):
            os.kill(pid, signal.SIGTERM)
        try:
            wait_until(lambda: not processes_of(self.path), "the end of all daemons", timeout_s=_STOP_S)
            left = []
        except AssertionError:
            left = processes_of(self.path)
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        arenas = self.arenas.exists()
        for log in sorted(Path(self.path).glob("*.log")):
            print(f"--- {log.name}\n{log.read_text(errors='replace')}")
        if arenas:
            shutil.rmtree(self.arenas, ignore_errors=True)
        litter = [] if self.daemon_was_killed else self.litter()
        shutil.rmtree(self.path, ignore_errors=True)
        assert not left, f"processes {left} outlived SIGTERM"
        assert self.daemon_was_killed or self.sessions_wait or not arenas, f"{self.arenas} was left behind"
        assert not litter, f"left behind: {litter}"


class Daemon:
    """A running daemon; ``settings`` go into its configuration file."""

    def __init__(self, runtime, *, mode="user", prefix=(), environment=None, at=None, **settings):
        self.runtime = runtime
        self._at = at or runtime.path
        self._log = Path(runtime.path, "daemon.log").open("ab")  # noqa: SIM115  # closed when the daemon has ended
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "ckptd.daemon", "--mode", mode, "--http", "127.0.0.1:0"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd="/",
            env={
                **os.environ,
                **runtime.environment,
                "CKPTD_CONFIG": runtime.configure(**settings),
                **(environment or {}),
            },
        )
        wait_readable(self._process.stdout, "the daemon's first line")
        self.greeting = self._process.stdout.readline().decode()
        assert "serves http://" in self.greeting, self.log()

    @property
    def pid(self):
        """Process id, as seen from here."""
        return self._process.pid

    def log(self):
        """Return what it has logged so far."""
        return Path(self.runtime.path, "daemon.log").read_text(errors="replace")

    def get(self, path):
        """Return status and body of an HTTP request."""
        return http_get(Path(self._at, "http").read_text().strip(), path)

    def status(self):
        """Return the decoded ``/status``."""
        return json.loads(self.get("/status")[1])

    def metric(self, name):
        """Return the value of one series, named as it is exposed."""
        lines = (line.rpartition(" ") for line in self.get("/metrics")[1].splitlines())
        return next(float(value) for series, _, value in lines if series == name)

    def workers(self, count=1):
        """Wait until so many workers run and return their pids."""

        def all_there():
            pids = self.status()["workers"]
            return pids if len(pids) >= count else None

        return wait_until(all_there, f"{count} workers")

    def generations(self):
        """Return the saves of all jobs."""
        return [save for job in self.status()["jobs"] for save in job["generations"]]

    def wait_for_save(self, checkpoint_id, predicate, *, timeout_s=PATIENCE_S):
        """Wait until the newest save of a checkpoint fulfils ``predicate`` and return it."""
        path = str(checkpoint_id)

        def found():
            saves = [save for save in self.generations() if save["checkpoint_id"] == path]
            return saves[-1] if saves and predicate(saves[-1]) else None

        return wait_until(found, f"a save of {path} as wanted", timeout_s=timeout_s)

    def signal(self, number):
        """Send a signal to the daemon alone."""
        self._process.send_signal(number)

    def kill(self):
        """End it as a crash would. What it left on tmpfs is no fault then."""
        self.runtime.daemon_was_killed = True
        self._process.kill()
        self.wait()

    def wait(self, timeout_s=_STOP_S):
        """Wait for its end and return the exit status."""
        status = self._process.wait(timeout_s)
        self._process.stdout.close()
        self._log.close()
        return status

    def stop(self):
        """Stop it with SIGTERM; it must leave in order and leave nothing."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            assert self.wait() == 0, self.log()
        elif not self._process.stdout.closed:
            self.wait()
        bugs = [line for line in self.log().splitlines() if "Traceback" in line or "bug " in line]
        assert not bugs, self.log()


def http_get(address, path):
    """Return status and body of a request to ``HOST:PORT``."""
    connection = http.client.HTTPConnection(address, timeout=PATIENCE_S)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


@pytest.fixture
def runtime(tmp_path, monkeypatch):
    """A private runtime directory, which this process uses, too; checked for litter at the end."""
    runtime = Runtime()
    runtime.watched.append(tmp_path)
    for name, value in runtime.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CKPTD_EMBEDDED", "0")
    monkeypatch.delenv("CKPTD_CONFIG", raising=False)
    yield runtime
    runtime.close()


@pytest.fixture
def start_daemon(runtime):
    """Start daemons: ``start_daemon(mode=..., **settings)``; they are stopped and checked at the end."""
    with _daemons(runtime) as start:
        yield start


@contextmanager
def _daemons(runtime):
    started = []

    def start(**settings):
        started.append(Daemon(runtime, **settings))
        return started[-1]

    try:
        yield start
    finally:
        sessions.close_all()  # this process's own would wait for a successor
        for daemon in started:
            daemon.stop()
        for pid in processes_of(runtime.path):
            wait_gone(pid, timeout_s=_STOP_S)


@pytest.fixture
def daemon(start_daemon):
    """A running daemon in user mode."""
    return start_daemon()
