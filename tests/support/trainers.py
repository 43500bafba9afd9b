"""Trainers as the tests see them: processes that run what they are told and can be killed at any line of it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support.nursery import receive, send
from support.processes import wait_gone
from support.waiting import PATIENCE_S

_ANSWER_S = 60.0  # several ranks share two cores with the rest of the machine


class TrainerRaised(Exception):
    """What a trainer ran raised. ``kind``: the class; ``text``: what it said."""

    def __init__(self, kind, text, trace):
        super().__init__(f"{kind}: {text}\n{trace}")
        self.kind, self.text = kind, text


class TrainerDied(Exception):
    """The trainer ended in the middle of what it was told."""


class Trainer:
    """One trainer process."""

    def __init__(self, connection, pid):
        self._connection, self.pid = connection, pid
        connection.settimeout(_ANSWER_S)

    def start(self, source, **variables):
        """Have statements run and do not wait for their end; :meth:`finish` does."""
        send(self._connection, ("do", source, variables))

    def finish(self):
        """Wait for what was started. Raises TrainerRaised or TrainerDied."""
        try:
            answer = receive(self._connection)
        except TimeoutError:
            raise AssertionError(f"trainer {self.pid} did not answer within {_ANSWER_S:.0f} s") from None
        except ConnectionError:
            answer = None
        if answer is None:
            raise TrainerDied(self.pid)
        kind, value = answer
        if kind == "error":
            raise TrainerRaised(*value)
        return value

    def do(self, source, **variables):
        """Run statements."""
        self.start(source, **variables)
        self.finish()

    def ask(self, source, **variables):
        """Have an expression evaluated and do not wait for its value; :meth:`finish` returns it."""
        send(self._connection, ("get", source, variables))

    def get(self, source, **variables):
        """Return the value of an expression."""
        self.ask(source, **variables)
        return self.finish()

    def kill(self, number=signal.SIGKILL):
        """Kill it and wait until it has ended."""
        os.kill(self.pid, number)
        wait_gone(self.pid)

    def leave(self):
        """Let it end in order and wait for that."""
        self.say_goodbye()
        self.wait_gone()

    def say_goodbye(self):
        """Let it end in order, once it has done what it was told."""
        self._connection.close()

    def wait_gone(self):
        """Wait for its end; one that is stuck is killed."""
        try:
            wait_gone(self.pid, timeout_s=PATIENCE_S)
        except AssertionError:
            self.kill()
            raise


class Ranks(list):
    """The trainers of one job; what they are told they do at the same time."""

    def do(self, source, **variables):
        """Run statements on all ranks; ``rank`` and ``world_size`` are set."""
        for rank, trainer in enumerate(self):
            trainer.start(source, rank=rank, world_size=len(self), **variables)
        self.finish()

    def get(self, source, **variables):
        """Return the value of an expression on each rank."""
        for rank, trainer in enumerate(self):
            trainer.ask(source, rank=rank, world_size=len(self), **variables)
        return self.finish()

    def finish(self):
        """Wait for all; the first failure is raised once all have answered."""
        values, failures = [], []
        for trainer in self:
            try:
                values.append(trainer.finish())
            except (TrainerRaised, TrainerDied) as failure:
                failures.append(failure)
        if failures:
            raise failures[0]
        return values


class Nursery:
    """Starts trainers; see support/nursery.py."""

    def __init__(self, prefix=(), script="nursery.py"):
        self._line, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [*prefix, sys.executable, str(Path(__file__).with_name(script)), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                cwd="/",
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            )
        self._line.settimeout(_ANSWER_S)
        assert receive(self._line), "the nursery did not come up"

    def trainer(self, *, environment, log, uid=0, without=()):
        """Fork a trainer."""
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._line, [b"!"], [theirs.fileno()])
            send(
                self._line,
                {"environment": environment, "log": str(log), "uid": uid, "without": list(without)},
            )
            pid = receive(self._line)
        return Trainer(ours, pid)

    def close(self):
        """End it; trainers end when their lines are closed."""
        self._line.close()
        self._process.wait(PATIENCE_S)


class Trainers:
    """Starts the trainers of one test and sees to their end."""

    def __init__(self, nursery, runtime, *, log_prefix="trainer"):
        self._nursery, self._runtime, self._log_prefix = nursery, runtime, log_prefix
        self._started = []

    def start(self, *, uid=0, without=(), **environment):
        """Start one trainer; without further word it may not start a daemon of its own."""
        number = len(self._started)
        variables = {**self._runtime.environment, "CKPTD_EMBEDDED": "0", **environment}
        log = Path(self._runtime.path, f"{self._log_prefix}-{number}.log")
        trainer = self._nursery.trainer(environment=variables, log=log, uid=uid, without=without)
        self._started.append(trainer)
        return trainer

    def job(self, count, name="job", **options):
        """Start the ranks of a job, told by arguments, and open their sessions."""
        ranks = Ranks(self.start() for _ in range(count))
        ranks.do(
            "session = dcp.connect(job=name, rank=rank, world_size=world_size, **options)",
            name=name,
            options=options,
        )
        return ranks

    def close(self):
        """Let those that live end in order."""
        for trainer in self._started:
            trainer.say_goodbye()
        for trainer in self._started:
            trainer.wait_gone()


@pytest.fixture(scope="session")
def nursery():
    """The process that forks trainers."""
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture
def trainers(nursery, runtime):
    """Start trainers on this test's runtime directory."""
    trainers = Trainers(nursery, runtime)
    yield trainers
    trainers.close()
