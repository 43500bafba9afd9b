"""The daemon: one asyncio loop that owns sessions, jobs and their ends. Loads no torch, touches no payload byte."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import pwd
import secrets
import shutil
import signal
import socket
import time
from collections import Counter
from dataclasses import dataclass
from typing import Final, Literal

from ckptd import __version__
from ckptd.daemon.attach import serve_attach
from ckptd.daemon.config import Config
from ckptd.daemon.http import HttpServer, start_http
from ckptd.daemon.jobs import Job
from ckptd.daemon.leftovers import claim
from ckptd.daemon.managed import Managed, on_hangup
from ckptd.daemon.metrics import Live, Metrics, Reason
from ckptd.daemon.notify import is_listened_on
from ckptd.daemon.router import Router
from ckptd.daemon.saves import JobContext
from ckptd.daemon.sessions import ArenaFile, Peer, Session
from ckptd.daemon.supervisor import Identity
from ckptd.protocol import errors
from ckptd.protocol.messages import (
    Attach,
    Attached,
    CacheOpened,
    ClientMessage,
    DaemonMessage,
    Detach,
    Drained,
    Echo,
    GaveUp,
    Heartbeat,
    OpenArena,
    OpenCache,
    Propose,
    Sealed,
)
from ckptd.protocol.paths import attach_socket, http_address_file, message_endpoint
from ckptd.staging.arena import create_arena

logger = logging.getLogger(__name__)

Mode = Literal["embedded", "user", "system"]

_TICK_S: Final = 1.0
_JOBS_REMEMBERED: Final = 64
_REASONS: Final[dict[type[errors.CkptdError], Reason]] = {
    errors.BadMessage: "garbage",
    errors.WrongToken: "token",
    errors.ProtocolMismatch: "protocol",
    errors.Forbidden: "uid",
}


@dataclass(frozen=True)
class Place:
    """Where a daemon runs. ``runtime``: directory of its sockets; ``http``: HOST:PORT."""

    runtime: str
    http: str
    mode: Mode


class Daemon:
    """One node's daemon; see :meth:`run`."""

    def __init__(self, config: Config, place: Place) -> None:
        self._config, self._place = config, place
        self.metrics = Metrics(self._live)
        self._jobs: dict[tuple[int, str], Job] = {}
        self._job_of: dict[Session, Job] = {}
        self._sessions: dict[bytes, Session] = {}
        self._arenas_made = 0
        self._started_unix_s = time.time()
        self._stopping = False
        self._stop = asyncio.Event()
        self._http_address = ""
        self._router: Router | None = None
        self._root = self._tmpfs_directory()
        self._name = secrets.token_hex(8)
        self._manager = Managed(config, place.mode, self.status)
        self._claim = -1
        # As root the workers take the trainer's uid; whoever runs a service for others decides whether that is enough.
        self._user_code = place.mode != "system" if config.user_code == "auto" else config.user_code

    def _tmpfs_directory(self) -> str:
        where = hashlib.blake2s(self._place.runtime.encode(), digest_size=6).hexdigest()
        return os.path.join(self._config.shm_dir, f"ckptd-{os.geteuid()}-{where}")

    # --- life ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until SIGTERM, SIGINT or, embedded, until nothing has been going on for long.

        Raises:
            SystemCallFailed: A socket, the lock or a directory cannot be had; another daemon may be running here.
        """
        lock = self._prepare_directories()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, on_hangup(self._manager.reload, self._stop.set))
        http: HttpServer | None = None
        path = attach_socket(self._place.runtime)
        try:
            listener = self._manager.listener(path) or _listen(path, everyone=self._place.mode == "system")
        except errors.CkptdError:
            shutil.rmtree(self._root, ignore_errors=True)
            raise
        try:
            self._router = Router(message_endpoint(self._place.runtime), self)
            if self._place.mode == "system":
                os.chmod(message_endpoint(self._place.runtime).removeprefix("ipc://"), 0o666)
            http = await start_http(self._place.http, self, self.metrics)
            self._http_address = http.address
            _write_text(http_address_file(self._place.runtime), http.address + "\n")
            attaching = asyncio.create_task(serve_attach(listener, self))
            routing = asyncio.create_task(self._router.run())
            ticking = asyncio.create_task(self._tick_for_ever())
            watching = asyncio.create_task(self._manager.watch(self._router))
            self._manager.ready()
            logger.info("ready (%s, pid %d): sockets in %s", self._place.mode, os.getpid(), self._place.runtime)
            print(f"ckptd {__version__} serves http://{http.address} from {self._place.runtime}", flush=True)  # noqa: T201
            tasks = [attaching, routing, ticking, watching]
            await self._wait_for_end(tasks)
            self._manager.stopping()
            logger.info("stopping: finishing what is sealed")
            if left := await self._finish(self._config.stop_timeout_s):
                logger.error("stopped with %d saves unfinished after %.0f s", left, self._config.stop_timeout_s)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            await self._tear_down(listener, http, lock)

    def _prepare_directories(self) -> int:
        runtime = self._place.runtime
        try:
            os.makedirs(runtime, mode=0o755 if self._place.mode == "system" else 0o700, exist_ok=True)
            owner = os.stat(runtime).st_uid
            if owner != os.geteuid():
                raise errors.Forbidden(os.geteuid(), owner)
            lock = os.open(os.path.join(runtime, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise errors.SystemCallFailed("lock", runtime, error.errno or 0) from None
        # With the lock held, whatever lies here is a dead daemon's.
        shutil.rmtree(self._root, ignore_errors=True)
        try:
            os.mkdir(self._root, 0o711)  # users' own directories lie below: they may pass, not list
        except OSError as error:
            raise errors.SystemCallFailed("mkdir", self._root, error.errno or 0) from None
        self._claim = claim(self._root, runtime)
        return lock

    async def _wait_for_end(self, tasks: list[asyncio.Task[None]]) -> None:
        stop = asyncio.create_task(self._stop.wait())
        done, _ = await asyncio.wait([stop, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in done - {stop}:
            task.result()  # a broken transport ends the process; the service manager starts it again

    async def _finish(self, timeout_s: float) -> int:
        """Finish what is sealed; take nothing new. Returns how many saves are unfinished when time is up."""
        self._stopping = True
        for job in self._jobs.values():
            job.saves.stop_collecting()
        pending = [g for job in self._jobs.values() for g in job.saves.generations.values()]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await asyncio.gather(*(generation.ended.wait() for generation in pending))
        return sum(not generation.ended.is_set() for generation in pending)

    async def _tear_down(self, listener: socket.socket, http: HttpServer | None, lock: int) -> None:
        for job in self._jobs.values():
            await job.close()
        listener.close()
        if http is not None:
            await http.close()
        if self._router is not None:
            self._router.close()
        runtime = self._place.runtime
        messages_socket = message_endpoint(runtime).removeprefix("ipc://")
        for path in (attach_socket(runtime), messages_socket, http_address_file(runtime)):
            if os.path.lexists(path) and not (path == attach_socket(runtime) and self._manager.owns_listener):
                os.unlink(path)
        shutil.rmtree(self._root, ignore_errors=True)
        os.close(self._claim)
        os.close(lock)

    async def _tick_for_ever(self) -> None:
        idle_since_s = time.monotonic()
        while True:
            await asyncio.sleep(_TICK_S)
            for job in list(self._jobs.values()):
                job.check_deadlines()
                if job.idle and job.pool is not None:
                    await job.close()
            self._forget_old_jobs()
            if not all(job.idle for job in self._jobs.values()):
                idle_since_s = time.monotonic()
            elif self._place.mode == "embedded" and time.monotonic() - idle_since_s > self._config.idle_exit_s:
                logger.info("idle for %.0f s: an embedded daemon ends", self._config.idle_exit_s)
                self._stop.set()

    def _forget_old_jobs(self) -> None:
        done = [key for key, job in self._jobs.items() if job.idle and job.pool is None]
        for key in done[: max(0, len(self._jobs) - _JOBS_REMEMBERED)]:
            del self._jobs[key]

    # --- attach: daemon.attach.Host ------------------------------------------------------------------------------

    def admit(self, peer: Peer) -> None:
        """In system mode everyone is served; else only our own user."""
        if self._place.mode != "system" and peer.uid != os.geteuid():
            raise errors.Forbidden(peer.uid, os.geteuid())

    def attach(self, peer: Peer, request: Attach) -> tuple[Session, Attached]:
        """Open a session for a rank."""
        if self._stopping:
            raise errors.ShuttingDown
        key = (peer.uid, request.job)
        job = self._jobs.get(key)
        if job is None:
            assert self._router is not None
            context = JobContext(self._config, self.metrics, self._send, self._root, self._user_code)
            job = Job(request.job, peer.uid, identity=_identity(peer), context=context)
        session = Session(peer, _identity(peer), request.rank, 0)
        job.attach(session, request)
        self._jobs[key] = job
        self._job_of[session] = job
        self._sessions[session.token] = session
        endpoint = message_endpoint(self._place.runtime)
        attached = Attached(
            session.token,
            endpoint,
            session.incarnation,
            self._config.heartbeat_s,
            self._config.session_timeout_s,
            os.getpid(),
            __version__,
            self._name,
            self._user_code,
        )
        return session, attached

    async def open_arena(self, session: Session, request: OpenArena) -> ArenaFile:
        """Make an arena; its pages are reserved by a thread, because that takes a second for some GB."""
        job = self._job_of[session]
        self._arenas_made += 1
        number = self._arenas_made
        job.release_arenas(session)
        path = job.files.path(f"rank-{session.rank}-{number}.arena")
        owner = job.files.owner
        descriptor = await asyncio.to_thread(
            create_arena, path, slots=request.slots, slot_bytes=request.slot_bytes, owner=owner
        )
        arena = ArenaFile(number, path, descriptor, request.slots, request.slot_bytes)
        session.arenas[number] = arena
        if not session.live:
            session.close_arena(number)
            raise errors.SessionClosed("the session ended while its arena was made")
        return arena

    async def open_cache(self, session: Session, request: OpenCache) -> tuple[CacheOpened, int]:
        """Let a session use its job's node cache."""
        return await self._job_of[session].cache.open(session, request.wanted_bytes)

    async def drain(self, peer: Peer, timeout_s: float) -> Drained:
        """Take nothing new from now on, and finish what is sealed; only the daemon's own user and root may ask."""
        if peer.uid not in (0, os.geteuid()):
            raise errors.Forbidden(peer.uid, os.geteuid())
        logger.info("draining, as pid %d asks: finishing what is sealed", peer.pid)
        return Drained(await self._finish(timeout_s), os.getpid())

    def lose(self, session: Session, reason: str) -> None:
        """A peer is gone."""
        self._sessions.pop(session.token, None)
        job = self._job_of.pop(session, None)
        if job is not None:
            job.lose(session, reason)

    def reject(self, error: errors.CkptdError) -> None:
        """Count what was turned away."""
        reason = _REASONS.get(type(error))
        if reason is not None:
            self.metrics.rejected(reason)

    # --- messages: daemon.router.Handler -------------------------------------------------------------------------

    def session(self, token: bytes) -> Session | None:
        """Return the live session that a token opens."""
        session = self._sessions.get(token)
        return session if session is not None and session.live else None

    def on_message(self, session: Session, message: ClientMessage) -> None:
        """Take a message of a session."""
        session.heard_at_s = time.monotonic()
        job = self._job_of[session]
        match message:
            case Heartbeat():
                self._send(session, Echo())
            case Propose():
                job.saves.on_propose(session, message)
            case Sealed():
                job.saves.on_sealed(session, message)
            case GaveUp():
                job.saves.on_gave_up(session, message)
            case Detach():
                self.lose(session, "left")
            case _:
                job.cache.on_message(session, message)

    def _send(self, session: Session, message: DaemonMessage) -> None:
        if self._router is not None:
            self._router.send(session, message)

    # --- what others see: daemon.http.View -----------------------------------------------------------------------

    def ready(self) -> str | None:
        """Return why the daemon takes no saves, or None if it does."""
        if not self._stopping:
            return None
        return "stopping" if self._stop.is_set() else "draining"

    def status(self) -> dict[str, object]:
        """Return what `/status` shows."""
        now = time.time()
        jobs = [job.status() for job in self._jobs.values()]
        return {
            "pid": os.getpid(),
            "version": __version__,
            "http": self._http_address,
            "mode": self._place.mode,
            "runtime_dir": self._place.runtime,
            "takes_saves": not self._stopping,
            "started_unix_s": self._started_unix_s,
            "uptime_s": now - self._started_unix_s,
            "workers": [pid for job in self._jobs.values() for pid in job.worker_pids],
            "jobs": jobs,
        }

    def _live(self) -> Live:
        slots = Counter({"free": 0, "staging": 0, "sealed": 0, "persisting": 0})
        arena_bytes = 0
        for session in self._sessions.values():
            for arena in session.arenas.values():
                slots.update(state.name.lower() for state, _ in arena.states())
                arena_bytes += arena.slots * arena.slot_bytes
        pools = [job.pool for job in self._jobs.values() if job.pool is not None]
        return Live(
            slots=dict(slots),
            queue_depth=sum(pool.depth for pool in pools),
            sessions=len(self._sessions),
            workers=sum(len(pool.pids) for pool in pools),
            arena_bytes=arena_bytes,
        )


def _identity(peer: Peer) -> Identity | None:
    """Return whom a peer's workers run as; None where that is ourselves."""
    if os.geteuid() != 0 or peer.uid == 0:
        return None
    try:
        name = pwd.getpwuid(peer.uid).pw_name
        groups = os.getgrouplist(name, peer.gid)
    except KeyError:
        groups = [peer.gid]  # a uid without a name, as in many containers
    return Identity(peer.uid, peer.gid, tuple(groups))


def _listen(path: str, *, everyone: bool) -> socket.socket:
    if is_listened_on(path):  # the lock is ours, so it is no daemon but a service manager: stop its socket first
        raise errors.SystemCallFailed("bind", path, errno.EADDRINUSE)
    if os.path.lexists(path):
        os.unlink(path)  # a dead daemon's
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        os.chmod(path, 0o666 if everyone else 0o600)
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        listener.close()
        raise errors.SystemCallFailed("bind", path, error.errno or 0) from None
    listener.setblocking(False)
    return listener


def _write_text(path: str, text: str) -> None:
    temporary = f"{path}.{os.getpid()}"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, path)
