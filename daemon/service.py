"""The daemon: one asyncio loop that owns sessions, jobs and their ends. Loads no torch, touches no payload byte."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
import time
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal

from ckptd import __version__
from ckptd.checkpoint.names import is_canonical
from ckptd.daemon.http.gate import load_access
from ckptd.daemon.http.server import HttpServer, Limits, start_http
from ckptd.daemon.job.crew import JobContext
from ckptd.daemon.job.jobs import Job, Owner
from ckptd.daemon.job.retained import open_images
from ckptd.daemon.monitoring.live import Observer, room_status
from ckptd.daemon.monitoring.metrics import Live, Metrics, Reason
from ckptd.daemon.monitoring.volumes import VolumeWatch
from ckptd.daemon.recovery.adoption import adopt_jobs, import_journal, next_number
from ckptd.daemon.recovery.directories import Directories
from ckptd.daemon.recovery.job_log import JobLog
from ckptd.daemon.recovery.journal import Journal
from ckptd.daemon.recovery.records import ArenaRecord
from ckptd.daemon.session.admission import Admission
from ckptd.daemon.session.attach import serve_attach
from ckptd.daemon.session.listening import listen, write_text
from ckptd.daemon.session.router import Router
from ckptd.daemon.session.sessions import ArenaFile, Peer, Session, identity_of
from ckptd.daemon.settings.config import Config
from ckptd.daemon.systemd.managed import Managed, on_hangup
from ckptd.protocol import errors
from ckptd.protocol.cache_messages import (
    CacheOpened,
    OpenCache,
)
from ckptd.protocol.messages import (
    Attach,
    Attached,
    ClientMessage,
    DaemonMessage,
    Detach,
    Drained,
    Echo,
    GaveUp,
    Heartbeat,
    OpenArena,
    Propose,
    Resume,
    Sealed,
)
from ckptd.protocol.paths import attach_socket, http_address_file, http_token_file, message_endpoint
from ckptd.protocol.retained import OpenRetained, RetainedClosed, RetainedOpened
from ckptd.protocol.retention_messages import Retain
from ckptd.protocol.wave_messages import WaveSealed
from ckptd.staging.arena import arena_bytes, create_arena, discard_pages

logger = logging.getLogger(__name__)

Mode = Literal["embedded", "user", "system"]

_TICK_S: Final = 1.0  # at most: more often where signs of life are asked for more often
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
        self._volumes = VolumeWatch(config.shm_dir)
        self._observer = Observer(self._volumes)
        self._http: HttpServer | None = None
        self._admission = Admission(config)
        self._jobs: dict[tuple[int, str], Job] = {}
        self._adopted: list[Job] = []  # from journals of other daemons: nobody attaches to these
        self._job_of: dict[Session, Job] = {}
        self._sessions: dict[bytes, Session] = {}
        self._arenas_made = 0
        self._started_unix_s = time.time()
        self._stopping = False
        self._leaving = False  # sessions that end now have not left: their clients wait for our successor
        self._stop = asyncio.Event()
        self._http_address = ""
        self._router: Router | None = None
        self._name = secrets.token_hex(8)
        self._manager = Managed(config, place.mode, self.status)
        # As root the workers take the trainer's uid; whoever runs a service for others decides whether that is enough.
        self._user_code = place.mode != "system" if config.user_code == "auto" else config.user_code

    # --- life ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until SIGTERM, SIGINT or, embedded, until nothing has been going on for long.

        Raises:
            SystemCallFailed: A socket, the lock or a directory cannot be had; another daemon may be running here.
        """
        everyone = self._place.mode == "system"
        self._directories = Directories(self._place.runtime, self._config.shm_dir, everyone=everyone)
        self._journal = Journal(self._directories.state)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, on_hangup(self._manager.reload, self._stop.set))
        http: HttpServer | None = None
        listener = self._take_listener(attach_socket(self._place.runtime), everyone=everyone)
        try:
            self._router = Router(message_endpoint(self._place.runtime), self)
            if self._place.mode == "system":
                os.chmod(message_endpoint(self._place.runtime).removeprefix("ipc://"), 0o666)
            self._http = http = await self._start_http()
            self._http_address = http.address
            self._volumes.start()
            self._adopt()
            write_text(http_address_file(self._place.runtime), http.address + "\n")
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
                logger.error(
                    "stopped with %d saves unfinished after %.0f s: left to the next daemon",
                    left, self._config.stop_timeout_s,
                )  # fmt: skip
            self._leaving = True
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            await self._tear_down(listener, http)

    async def _start_http(self) -> HttpServer:
        access, limits = load_access(self._config), Limits(self._config.http_connections)
        server = await start_http(self._place.http, self, self.metrics, access=access, limits=limits)
        if access.token is not None:
            # For `ckptd status`, which is ours if it can read this.
            write_text(http_token_file(self._place.runtime), access.token + "\n", mode=0o600)
        return server

    def _take_listener(self, path: str, *, everyone: bool) -> socket.socket:
        """Return the attach socket: the service manager's, or one of our own."""
        try:
            return self._manager.listener(path) or listen(path, everyone=everyone)
        except errors.CkptdError:
            self._journal.close()
            with contextlib.suppress(OSError):  # something for our successor lies there
                os.rmdir(self._directories.root)
            self._directories.release()
            raise

    def _context(self) -> JobContext:
        return JobContext(
            self._config, self.metrics, self._send, self._directories.root, self._journal, self._user_code
        )

    def _adopt(self) -> None:
        """Take up what a daemon before us has left here."""
        self._arenas_made = max((arena.number for arena in self._journal.read(ArenaRecord)), default=0)
        for job in adopt_jobs(self._context()):
            self._jobs[job.owner.uid, job.name] = job
            for session in job.sessions.values():
                self._job_of[session] = job
                self._sessions[session.token] = session
        self._directories.clear_root({job.files.directory for job in self._jobs.values()})
        self._adopt_from_others()

    def _adopt_from_others(self) -> None:
        """Finish what daemons have left that are dead and whose clients are, too; reclaim memory that nobody uses."""
        for directory in self._directories.journals_of_the_dead():
            first = next_number(self._journal)
            if import_journal(directory, self._journal):
                self._adopted += adopt_jobs(self._context(), since=first)
        kept = {job.files.directory for job in self._all_jobs()}
        for root in self._directories.reclaim_orphans(kept, older_than_s=self._config.orphan_timeout_s):
            logger.warning("reclaimed %s: its daemon is dead and no process uses it", root)

    def _all_jobs(self) -> list[Job]:
        return [*self._jobs.values(), *self._adopted]

    async def _wait_for_end(self, tasks: list[asyncio.Task[None]]) -> None:
        stop = asyncio.create_task(self._stop.wait())
        done, _ = await asyncio.wait([stop, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in done - {stop}:
            task.result()  # a broken transport ends the process; the service manager starts it again

    async def _finish(self, timeout_s: float) -> int:
        """Finish what is sealed; take nothing new. Returns how many saves are unfinished when time is up."""
        self._stopping = True
        for job in self._all_jobs():
            job.saves.stop_collecting()
        pending = [g for job in self._all_jobs() for g in job.saves.generations.values()]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await asyncio.gather(*(generation.ended.wait() for generation in pending))
        return sum(not generation.ended.is_set() for generation in pending)

    async def _tear_down(self, listener: socket.socket, http: HttpServer | None) -> None:
        left = False
        for job in self._all_jobs():
            if job.idle:
                await job.close()
            else:  # its clients, or what is sealed, wait for our successor
                left = True
                await job.leave_to_successor()
        listener.close()
        if http is not None:
            await http.close()
        if self._router is not None:
            self._router.close()
        runtime = self._place.runtime
        messages_socket = message_endpoint(runtime).removeprefix("ipc://")
        self._volumes.close()
        for path in (attach_socket(runtime), messages_socket, http_address_file(runtime), http_token_file(runtime)):
            if os.path.lexists(path) and not (path == attach_socket(runtime) and self._manager.owns_listener):
                os.unlink(path)
        self._journal.close(emptied=not left)
        self._directories.release(emptied=not left)

    async def _tick_for_ever(self) -> None:
        idle_since_s = last_s = time.monotonic()
        tick_s = min(_TICK_S, self._config.heartbeat_s)
        while True:
            await asyncio.sleep(tick_s)
            now = time.monotonic()
            late_s, last_s = now - last_s - tick_s, now
            if late_s > _TICK_S:  # while we were stopped ourselves, nobody was silent
                for job in self._all_jobs():
                    job.forgive(late_s)
            for job in self._all_jobs():
                await self._look_after(job)
            self._forget_old_jobs()
            if not all(job.resting for job in self._all_jobs()):
                idle_since_s = time.monotonic()
            elif self._place.mode == "embedded" and time.monotonic() - idle_since_s > self._config.idle_exit_s:
                logger.info("idle for %.0f s: an embedded daemon ends", self._config.idle_exit_s)
                self._stop.set()
            self._adopt_from_others()
            if self._journal.wants_tidying:
                await asyncio.to_thread(self._journal.tidy)

    async def _look_after(self, job: Job) -> None:
        job.check_deadlines()
        job.expire()
        if job.empty and job.in_use:
            await job.close()
        elif job.resting and job.pool is not None:
            await job.rest()

    def _forget_old_jobs(self) -> None:
        self._adopted = [job for job in self._adopted if job.in_use]
        done = [key for key, job in self._jobs.items() if not job.in_use]
        for key in done[: max(0, len(self._jobs) - _JOBS_REMEMBERED)]:
            self._jobs.pop(key).log.forget()

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
            owner = Owner(peer.uid, peer.gid, identity_of(peer))
            log = JobLog(self._journal, self._new_number())
            job = Job(request.job, owner, context=self._context(), log=log)
        session = Session(peer, identity_of(peer), request.rank, 0)
        job.attach(session, request)
        self._jobs[key] = job
        self._job_of[session] = job
        self._sessions[session.token] = session
        return session, self._attached(session)

    def _new_number(self) -> int:
        known = [job.log.number for job in self._all_jobs()]
        return max([next_number(self._journal), *(number + 1 for number in known)])

    def resume(self, peer: Peer, request: Resume) -> tuple[Session, Attached]:
        """Go on with a session whose connection, or whose daemon, is gone."""
        if self._stopping:
            raise errors.ShuttingDown
        session = self._sessions.get(request.token)
        if session is None or not session.live:
            job = self._jobs.get((peer.uid, request.job))
            if job is not None and job.roster.incarnation > request.incarnation:
                raise errors.SessionClosed(f"incarnation {job.roster.incarnation} of job {request.job!r} took over")
            raise errors.SessionUnknown(request.job)
        if peer.uid != session.peer.uid:
            raise errors.Forbidden(peer.uid, session.peer.uid)
        session.heard_at_s = time.monotonic()
        session.attached = True
        session.attachment += 1
        job = self._job_of[session]
        job.take_up_seals_of(session)
        logger.info("rank %d of job %s is back", session.rank, job.name)
        return session, self._attached(session)

    def _attached(self, session: Session) -> Attached:
        return Attached(
            session.token,
            message_endpoint(self._place.runtime),
            session.incarnation,
            self._config.heartbeat_s,
            self._config.session_timeout_s,
            os.getpid(),
            __version__,
            self._name,
            self._user_code,
            self._place.mode == "embedded",
        )

    async def open_arena(self, session: Session, request: OpenArena) -> ArenaFile:
        """Make an arena, if there is room; a thread reserves its pages, because that takes a second for some GB."""
        job = self._job_of[session]
        self._arenas_made += 1
        number = self._arenas_made
        for number_before in session.arenas.keys() - job.saves.busy_arenas:
            discard_pages(session.arenas[number_before].descriptor)  # the client has dropped it, or it would not ask
        job.release_arenas(session)
        path = job.files.path(f"rank-{session.rank}-{number}.arena")
        owner = job.files.owner
        make = partial(create_arena, path, slots=request.slots, slot_bytes=request.slot_bytes, owner=owner)
        nbytes = arena_bytes(request.slots, request.slot_bytes)
        try:
            with self._admission.reserve(path, nbytes, pid=session.peer.pid):
                descriptor = await asyncio.to_thread(make)
        except errors.ShmTooSmall:
            if not self._drop_what_the_dead_keep():
                raise
            with self._admission.reserve(path, nbytes, pid=session.peer.pid):
                descriptor = await asyncio.to_thread(make)
        arena = ArenaFile(number, path, descriptor, request.slots, request.slot_bytes)
        job.open_arena(session, arena)
        return arena

    def _drop_what_the_dead_keep(self) -> bool:
        """Give up the last commits of ended jobs for one that needs the memory; say whether there were any."""
        keeping = [job for job in self._all_jobs() if job.retained_bytes_of_the_dead]
        for job in keeping:
            logger.info("job %s: %d bytes of its last commit make room", job.name, job.retained_bytes_of_the_dead)
            job.saves.drop_retained()
        return bool(keeping)

    async def open_cache(self, session: Session, request: OpenCache) -> tuple[CacheOpened, int]:
        """Let a session use its job's node cache."""
        return await self._job_of[session].cache.open(session, request.wanted_bytes)

    def open_retained(self, peer: Peer, request: OpenRetained) -> tuple[RetainedOpened, list[int]]:
        """Find the save that a load asks for in memory."""
        jobs = self._all_jobs() if self._config.retain_s else []
        opened, descriptors = open_images(jobs, peer, request)
        if opened.images:
            logger.info("pid %d loads %s from memory", peer.pid, request.checkpoint_id)
        else:
            self.metrics.loaded_from_memory("absent", 0)
        return opened, descriptors

    def retained_closed(self, message: RetainedClosed) -> None:
        """A load from memory is over."""
        self.metrics.loaded_from_memory(message.outcome, message.read_bytes)

    async def drain(self, peer: Peer, timeout_s: float) -> Drained:
        """Take nothing new from now on, and finish what is sealed; only the daemon's own user and root may ask."""
        if peer.uid not in (0, os.geteuid()):
            raise errors.Forbidden(peer.uid, os.geteuid())
        logger.info("draining, as pid %d asks: finishing what is sealed", peer.pid)
        return Drained(await self._finish(timeout_s), os.getpid())

    def lose(self, session: Session, reason: str) -> None:
        """A peer is gone."""
        if self._leaving:
            return
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
            case Sealed() | WaveSealed():
                job.saves.on_sealed(session, message)
            case GaveUp():
                job.saves.on_gave_up(session, message)
            case Retain():
                if not is_canonical(message.root):
                    raise errors.BadMessage(f"folder {message.root!r}, which is no absolute path")
                job.retention.request(message.root, message.keep)
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
        jobs = [job.status() for job in self._all_jobs()]
        return {
            "pid": os.getpid(),
            "version": __version__,
            "http": self._http_address,
            "mode": self._place.mode,
            "runtime_dir": self._place.runtime,
            "takes_saves": not self._stopping,
            "started_unix_s": self._started_unix_s,
            "uptime_s": now - self._started_unix_s,
            "now_unix_s": now,
            "last_commit_unix_s": self.metrics.last_commit_s,
            "volumes": room_status(self._observer.rooms(self._all_jobs())),
            "workers": [pid for job in self._all_jobs() for pid in job.worker_pids],
            "jobs": jobs,
        }

    def _live(self) -> Live:
        return self._observer.observe(self._all_jobs(), self._sessions.values(), self._http)
