"""One job on this node: its ranks over the incarnations, its workers, its files, and its saves.

Invariant: whatever a rank had sealed when its session ended is taken up before the rank is given up.
"""

from __future__ import annotations

import logging

from ckptd.daemon.jobfiles import JobFiles
from ckptd.daemon.nodecache import NodeCache
from ckptd.daemon.saves import JobContext, Saves
from ckptd.daemon.sessions import Session
from ckptd.daemon.supervisor import Identity, WorkerPool, WorkerSettings
from ckptd.protocol.errors import BadMessage, DeadlineExceeded, SessionClosed, Unsupported
from ckptd.protocol.messages import Attach, Fenced
from ckptd.protocol.session import Roster

logger = logging.getLogger(__name__)


class Job:
    """One job of one user.

    Args:
        name: The job's name.
        uid: The user's id.
        identity: Whom its workers run as; None is the daemon's own user.
        context: What it shares with the other jobs.
    """

    def __init__(self, name: str, uid: int, *, identity: Identity | None, context: JobContext) -> None:
        self.name, self.uid = name, uid
        self._identity, self._context = identity, context
        self.roster = Roster(name)
        self.sessions: dict[int, Session] = {}
        self.progress_timeout_s = context.config.progress_timeout_s
        self.pool: WorkerPool | None = None
        self._user_pool: WorkerPool | None = None
        self.files = JobFiles(context.root, identity)
        self.saves = Saves(self, context)
        self.cache = NodeCache(self, context)
        self._retired: list[Session] = []  # ended sessions whose slots are still being written

    def attach(self, session: Session, request: Attach) -> None:
        """Seat a session; older ones of the job may be fenced by it. Raises RankTaken or RankMismatch."""
        before = self.roster.incarnation
        older = self.sessions.get(request.rank)
        if older is not None and older.peer.has_ended():
            self.lose(older, "ended")  # its end and its successor's call came in the same moment
        self.roster.join(request.rank, world_size=request.world_size, launch=request.launch, pid=session.peer.pid)
        session.incarnation = self.roster.incarnation
        if self.roster.incarnation != before:
            self._begin_incarnation()
        self.sessions[request.rank] = session
        if request.progress_timeout_s:
            self.progress_timeout_s = min(request.progress_timeout_s, self._context.config.progress_timeout_s)
        self._open_pool()

    def _begin_incarnation(self) -> None:
        error = SessionClosed(f"incarnation {self.roster.incarnation} of job {self.name!r} took over")
        for old in list(self.sessions.values()):
            logger.info("job %s: incarnation %d fences rank %d", self.name, self.roster.incarnation, old.rank)
            self._harvest(old)
            self._context.send(old, Fenced(error.report()))
            self._retire(old)
        self.sessions.clear()
        self.saves.forget_plan()
        self.saves.fail_incomplete(error)
        self.cache.close()
        self.progress_timeout_s = self._context.config.progress_timeout_s

    def _open_pool(self) -> None:
        if self.pool is None:
            self.pool = self._new_pool(min(self.roster.world_size, self._context.config.workers_per_job))

    def open_user_pool(self) -> WorkerPool:
        """Return the one worker that may load torch and users' own code, started when it is first needed."""
        if not self._context.user_code:
            raise Unsupported(
                "a user's own planner or storage writer", "set user_code = true in the daemon's configuration"
            )
        if self._user_pool is None:
            self._user_pool = self._new_pool(1, users_code=True)
        return self._user_pool

    def _new_pool(self, count: int, *, users_code: bool = False) -> WorkerPool:
        config = self._context.config
        settings = WorkerSettings(
            count=count,
            nice=config.worker_nice,
            attempts=config.work_attempts,
            silence_s=self.progress_timeout_s,
            identity=self._identity,
            users_code=users_code,
        )
        metrics = self._context.metrics
        pool = WorkerPool(settings, on_restart=metrics.worker_restarted, on_retry=metrics.work_retried)
        pool.start()
        return pool

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the job's live workers."""
        return [pid for pool in (self.pool, self._user_pool) if pool is not None for pid in pool.pids]

    def lose(self, session: Session, reason: str) -> None:
        """A session ended: take up what it sealed, and fail what now can never be complete."""
        if not session.live:
            return
        self._harvest(session)
        if self.sessions.get(session.rank) is session:
            del self.sessions[session.rank]
        self.roster.leave(session.rank, incarnation=session.incarnation)
        self.saves.rank_fell(session, reason)
        self.cache.lose(session)
        self._retire(session)

    def _harvest(self, session: Session) -> None:
        """Handle the seals that stand in a session's arenas, as if their messages had come; most have."""
        for seal in list(session.seals_left_behind()):
            try:
                self.saves.on_sealed(session, seal)
            except BadMessage as error:
                logger.warning("job %s: rank %d left %s", self.name, session.rank, error)

    def _retire(self, session: Session) -> None:
        session.live = False
        self._retired.append(session)
        self.release_retired()

    def release_retired(self) -> None:
        """Give up the arenas of ended sessions that no generation needs any more."""
        for session in list(self._retired):
            self.release_arenas(session)
            if not session.arenas:
                self._retired.remove(session)

    def release_arenas(self, session: Session) -> None:
        """Give up a session's arenas that no generation needs."""
        busy = self.saves.busy_arenas
        for number in [number for number in session.arenas if number not in busy]:
            session.close_arena(number)

    @property
    def idle(self) -> bool:
        """Whether nobody is connected and nothing is in flight."""
        return not self.sessions and not self.saves.generations

    def check_deadlines(self) -> None:
        """Fail generations without news, and lose sessions that fell silent."""
        self.saves.check_deadlines()
        self.cache.tick()
        for session in list(self.sessions.values()):
            if session.silent_s > self._context.config.session_timeout_s:
                silent = DeadlineExceeded("the daemon heard nothing of this process", session.silent_s)
                self._context.send(session, Fenced(silent.report()))
                self.lose(session, f"was silent for {session.silent_s:.0f} s")

    async def close(self) -> None:
        """End the workers and remove the job's files."""
        pools, self.pool, self._user_pool = (self.pool, self._user_pool), None, None
        files, self.files = self.files, JobFiles(self._context.root, self._identity)
        sessions = [*self.sessions.values(), *self._retired]
        self._retired = []
        self.saves.forget_plan()
        self.cache.close()
        for session in sessions:
            for number in list(session.arenas):
                session.close_arena(number)
        for pool in pools:
            if pool is not None:
                await pool.close()
        files.remove()

    def status(self) -> dict[str, object]:
        """Return what `/status` tells of the job."""
        sessions = sorted(self.sessions.values(), key=lambda session: session.rank)
        return {
            "job": self.name,
            "incarnation": self.roster.incarnation,
            "uid": self.uid,
            "world_size": self.roster.world_size,
            "workers": self.worker_pids,
            "interval_s": self.saves.watch.cadence.interval_s,
            "sessions": [session.status() for session in sessions],
            "generations": self.saves.status(),
        }
