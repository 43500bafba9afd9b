"""Starts workers, watches them, and does the work of a dead one again: the sealed slot is still there.

Invariant: every task that is taken ends, with an answer or an error; none waits for a dead or silent worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from ckptd.daemon.session.frames import FRAME_LENGTH, read_frame
from ckptd.protocol import messages
from ckptd.protocol.errors import (
    CkptdError,
    DeadlineExceeded,
    ShuttingDown,
    SystemCallFailed,
    WorkerDied,
    from_report,
)
from ckptd.protocol.messages import Task, TaskFailed, TaskReply, WriteProgress

logger = logging.getLogger(__name__)

# A worker answers with columns over all items; 1,000,000 items are 8 MB of hashes.
_REPLY_LIMIT_BYTES: Final = 1 << 30
_REAP_TIMEOUT_S: Final = 10.0


@dataclass(frozen=True)
class Identity:
    """Whom a worker runs as; None keeps the daemon's own user."""

    uid: int
    gid: int
    groups: tuple[int, ...]


@dataclass(frozen=True)
class WorkerSettings:
    """How workers of one job are run.

    Attributes:
        count: Number of processes.
        nice: Their niceness, once they have started.
        attempts: How often work is begun that workers die of.
        silence_s: A task without news for so long is given up.
        identity: Whom they run as.
        users_code: Whether they load torch, for users' own planners and writers.
    """

    count: int
    nice: int
    attempts: int
    silence_s: float
    identity: Identity | None
    users_code: bool = False


@dataclass(eq=False)
class _Job:
    """One task and the future of its answer."""

    task: Task
    on_progress: Callable[[int], None]
    on_start: Callable[[float], None]
    answer: asyncio.Future[TaskReply]
    started: bool = False
    queued_at_s: float = field(default_factory=time.monotonic)


class _WorkerProcess:
    """One spawned worker and the stream to it."""

    def __init__(self, settings: WorkerSettings, lock: int) -> None:
        ours, theirs = socket.socketpair()
        who: dict[str, object] = {}
        if settings.identity is not None:
            identity = settings.identity
            who = {"user": identity.uid, "group": identity.gid, "extra_groups": list(identity.groups)}
        with theirs:
            self.process = subprocess.Popen(
                _command(theirs.fileno(), settings),
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), lock],  # as long as it lives, a successor of this daemon waits
                env=_worker_environment(),
                cwd="/",
                **who,  # type: ignore[call-overload]
            )
        self._socket = ours

    async def connect(self) -> None:
        """Bring the socket into the loop."""
        self.reader, self.writer = await asyncio.open_unix_connection(sock=self._socket, limit=1 << 22)

    async def run(self, job: _Job, *, silence_s: float) -> TaskReply:
        """Send one task and return its answer.

        Raises:
            EOFError: The worker died.
            TimeoutError: It said nothing for ``silence_s``.
        """
        frame = messages.encode(job.task)
        try:
            self.writer.write(FRAME_LENGTH.pack(len(frame)) + frame)
            async with asyncio.timeout(silence_s):
                await self.writer.drain()
        except ConnectionError:
            raise EOFError from None
        while True:
            async with asyncio.timeout(silence_s):
                reply = messages.decode_task_reply(await read_frame(self.reader, limit_bytes=_REPLY_LIMIT_BYTES))
            if not isinstance(reply, WriteProgress):
                return reply
            job.on_progress(reply.bytes_done)

    def end(self) -> int:
        """Kill the process if need be, reap it and return its exit status; one that hangs in the kernel is left."""
        self.process.kill()
        try:
            return int(self.process.wait(timeout=_REAP_TIMEOUT_S))
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL


def _command(descriptor: int, settings: WorkerSettings) -> list[str]:
    numbers = [str(number) for number in (descriptor, settings.nice, os.getpid())]
    command = [sys.executable, "-m", "ckptd.daemon.workers.worker", *numbers]
    return [*command, "--users-code"] if settings.users_code else command


def _worker_environment() -> dict[str, str]:
    # No GPU is visible to a worker, and numpy needs no threads of its own. Each save has new threads: with an arena of
    # glibc's malloc for each, resident memory would creep up for some hundred saves.
    own = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    return {**os.environ, **own}


class WorkerPool:
    """The workers of one job: ``settings.count`` processes that take tasks from one queue, oldest first.

    Args:
        settings: How they are run.
        lock: Waits until no worker of an earlier daemon is left, and returns the descriptor that ours inherit.
        on_restart: Called when a dead worker is replaced.
        on_retry: Called when the task of a dead worker is begun anew.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        *,
        lock: Callable[[], Awaitable[int]],
        on_restart: Callable[[], None],
        on_retry: Callable[[], None] = lambda: None,
    ) -> None:
        self._settings, self._lock = settings, lock
        self._on_restart, self._on_retry = on_restart, on_retry
        self._queue: asyncio.Queue[_Job] = asyncio.Queue()
        self._processes: dict[int, _WorkerProcess] = {}
        self._loops: list[asyncio.Task[None]] = []
        self._closed = False

    def start(self) -> None:
        """Spawn the workers."""
        self._loops = [asyncio.create_task(self._serve(n)) for n in range(self._settings.count)]

    @property
    def pids(self) -> list[int]:
        """Process ids of the live workers."""
        return [worker.process.pid for worker in self._processes.values() if worker.process.poll() is None]

    @property
    def depth(self) -> int:
        """Number of tasks that wait for a worker."""
        return self._queue.qsize()

    async def run(
        self,
        task: Task,
        *,
        on_progress: Callable[[int], None] = lambda _: None,
        on_start: Callable[[float], None] = lambda _: None,
    ) -> TaskReply:
        """Have a task done, again and again if workers die of it.

        Args:
            task: What to do.
            on_progress: Called with the bytes written so far.
            on_start: Called with the seconds that the task waited for a worker.

        Raises:
            WorkerDied: It died more often than work is done again.
            DeadlineExceeded: The worker said nothing for too long; it was killed.
            CkptdError: The task failed for a foreseen reason, which is raised here.
        """
        if self._closed:
            raise ShuttingDown
        job = _Job(task, on_progress, on_start, asyncio.get_running_loop().create_future())
        self._queue.put_nowait(job)
        try:
            reply = await asyncio.shield(job.answer)
        except asyncio.CancelledError:
            if job.started:
                await asyncio.wait([job.answer])  # it is at work on the files: not over until it says so
            else:
                job.answer.cancel()
            raise
        if isinstance(reply, TaskFailed):
            raise from_report(reply.error)
        return reply

    async def close(self) -> None:
        """End all workers; tasks that are still queued fail."""
        self._closed = True
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        while not self._queue.empty():
            _fail(self._queue.get_nowait(), ShuttingDown())

    async def _serve(self, number: int) -> None:
        """Keep one worker alive and busy."""
        job: _Job | None = None
        try:
            with contextlib.suppress(TimeoutError, OSError, CkptdError):  # ahead of the first task, which tells of it
                await self._worker(number)
            while True:
                job = await self._queue.get()
                if job.answer.done():
                    continue  # called off while it waited
                job.started = True
                job.on_start(time.monotonic() - job.queued_at_s)
                await self._perform(number, job)
        finally:
            if job is not None:
                _fail(job, ShuttingDown())
            await self._end(number)

    async def _worker(self, number: int) -> _WorkerProcess:
        """Return the live worker of this place, spawning it if need be."""
        worker = self._processes.get(number)
        if worker is None:
            async with asyncio.timeout(self._settings.silence_s):
                lock = await self._lock()
            worker = _WorkerProcess(self._settings, lock)
            await worker.connect()
            self._processes[number] = worker
        return worker

    async def _perform(self, number: int, job: _Job) -> None:
        error: CkptdError = ShuttingDown()
        for attempt in range(1, self._settings.attempts + 1):
            if attempt > 1:
                self._on_retry()
            try:
                worker = await self._worker(number)
            except TimeoutError:  # before OSError, of which it is one
                error = DeadlineExceeded(
                    "a worker of the daemon before this one does not end", self._settings.silence_s
                )
                break
            except OSError as failed:
                error = SystemCallFailed("spawn", sys.executable, failed.errno or 0)
                break
            except CkptdError as failed:
                error = failed
                break
            try:
                reply = await worker.run(job, silence_s=self._settings.silence_s)
            except TimeoutError:
                error = DeadlineExceeded(f"worker pid {worker.process.pid}", self._settings.silence_s)
                await self._end(number)
                self._on_restart()
                break
            except (EOFError, CkptdError) as reason:
                pid, status = worker.process.pid, await self._end(number)
                self._on_restart()
                logger.warning("worker pid %d died (status %d, %r), attempt %d", pid, status, reason, attempt)
                error = WorkerDied(pid, status, attempt)
            else:
                if not job.answer.done():
                    job.answer.set_result(reply)
                return
        _fail(job, error)

    async def _end(self, number: int) -> int:
        """End the worker of this place, if there is one, and return its exit status."""
        worker = self._processes.pop(number, None)
        if worker is None:
            return 0
        worker.writer.close()
        return await asyncio.to_thread(worker.end)


def _fail(job: _Job, error: CkptdError) -> None:
    if not job.answer.done():
        job.answer.set_exception(error)
