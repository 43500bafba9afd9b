"""One job on this node: its ranks over the incarnations, its workers, its files, and its saves.

Invariant: whatever a rank had sealed when its session ended is taken up before the rank is given up.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from ckptd.daemon.job.crew import JobContext
from ckptd.daemon.job.jobfiles import JobFiles
from ckptd.daemon.job.nodecache import NodeCache
from ckptd.daemon.job.retention import Retention
from ckptd.daemon.job.saves import Saves
from ckptd.daemon.recovery.job_log import JobLog
from ckptd.daemon.session.sessions import ArenaFile, Session
from ckptd.daemon.workers.supervisor import Identity, WorkerPool, WorkerSettings
from ckptd.protocol.errors import BadMessage, DeadlineExceeded, SessionClosed, Unsupported
from ckptd.protocol.messages import Attach, Fenced
from ckptd.protocol.session import Roster, Seat
from ckptd.staging.arena import arena_bytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Owner:
    """Whose a job is. ``identity``: whom its workers run as; None is the daemon's own user."""

    uid: int
    gid: int
    identity: Identity | None


class Job:
    """One job of one user.

    Args:
        name: The job's name.
        owner: Whose it is.
        context: What it shares with the other jobs.
        log: Its part of the journal.
        directory: Where its files lie on tmpfs, if a daemon before us has made it; "" makes a new one.
    """

    def __init__(self, name: str, owner: Owner, *, context: JobContext, log: JobLog, directory: str = "") -> None:
        self.name, self.owner, self.log = name, owner, log
        self._context = context
        self.roster = Roster(name)
        self.sessions: dict[int, Session] = {}
        self.progress_timeout_s = context.config.progress_timeout_s
        self.pool: WorkerPool | None = None
        self._user_pool: WorkerPool | None = None
        self.files = self._new_files(directory)
        self.saves = Saves(self, context)
        self.cache = NodeCache(self, context)
        self.retention = Retention(
            name, open_pool=lambda: self._new_pool(1), saving=self.saves.ids_in_flight, metrics=context.metrics
        )
        self._retired: list[Session] = []  # ended sessions whose slots are still being written, or keep the last commit
        self._left_at_s = time.monotonic()  # when the last rank left

    def attach(self, session: Session, request: Attach) -> None:
        """Seat a session; older ones of the job may be fenced by it. Raises RankTaken or RankMismatch."""
        before = self.roster.incarnation
        older = self.sessions.get(request.rank)
        # The end of the one before and the call of this one come in the same moment; or it was lost and begins anew.
        if older is not None and (older.peer.has_ended() or (not older.attached and older.peer == session.peer)):
            self.lose(older, "ended")
        self.roster.join(request.rank, world_size=request.world_size, launch=request.launch, pid=session.peer.pid)
        session.incarnation = self.roster.incarnation
        if self.roster.incarnation != before:
            self._begin_incarnation()
        self.sessions[request.rank] = session
        self.write_down()
        self.log.session(session)
        if request.progress_timeout_s:
            self.progress_timeout_s = min(request.progress_timeout_s, self._context.config.progress_timeout_s)
        self.open_pool()

    def _new_files(self, directory: str = "") -> JobFiles:
        return JobFiles(self._context.root, self.owner.identity, on_made=self.write_down, directory=directory)

    def write_down(self) -> None:
        """Bring the journal up to date on the roster and the directory."""
        self.log.job(self.roster, uid=self.owner.uid, gid=self.owner.gid, directory=self.files.directory)

    def take_up(self, session: Session) -> None:
        """Seat a session that a daemon before us has opened; its client comes back, or is found to be gone."""
        if not session.live:
            self._retired.append(session)
            return
        self.sessions[session.rank] = session
        self.roster.seats[session.rank] = Seat(session.peer.pid)

    def take_up_seals(self) -> None:
        """Look into the arenas for what was sealed but not said, and lose the sessions whose clients are gone."""
        for session in list(self.sessions.values()):
            self.take_up_seals_of(session)
            if session.client_has_ended:
                self.lose(session, "ended while no daemon ran")
        self.release_retired()

    def open_arena(self, session: Session, arena: ArenaFile) -> None:
        """A session has got an arena."""
        self.log.arena(session, arena)
        session.arenas[arena.number] = arena
        if not session.live:
            self.give_up_arena(session, arena.number)
            raise SessionClosed("the session ended while its arena was made")

    def give_up_arena(self, session: Session, number: int) -> None:
        """Remove an arena; its pages go when the last process that maps it goes."""
        arena = session.arenas.get(number)
        if arena is not None:
            self.log.arena_over(arena.path)
            session.close_arena(number)

    def _begin_incarnation(self) -> None:
        error = SessionClosed(f"incarnation {self.roster.incarnation} of job {self.name!r} took over")
        for old in list(self.sessions.values()):
            logger.info("job %s: incarnation %d fences rank %d", self.name, self.roster.incarnation, old.rank)
            self.take_up_seals_of(old)
            self._context.send(old, Fenced(error.report()))
            self._retire(old)
        self.sessions.clear()
        self.saves.plans.put_in_force(None)
        self.saves.fail_incomplete(error)
        self.cache.close()
        self.progress_timeout_s = self._context.config.progress_timeout_s

    def open_pool(self) -> None:
        """Start the workers, if they do not run."""
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
            identity=self.owner.identity,
            users_code=users_code,
        )
        lock, metrics = self.files.lock_out_older_workers, self._context.metrics
        on_restart, on_retry = metrics.worker_restarted, metrics.work_retried
        pool = WorkerPool(settings, lock=lock, on_restart=on_restart, on_retry=on_retry)
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
        self.take_up_seals_of(session)
        if self.sessions.get(session.rank) is session:
            del self.sessions[session.rank]
        self.roster.leave(session.rank, incarnation=session.incarnation)
        self.saves.rank_fell(session, reason)
        self.cache.lose(session)
        self._retire(session)

    def take_up_seals_of(self, session: Session) -> None:
        """Handle the seals that stand in a session's arenas, as if their messages had come; most have."""
        for seal in list(session.seals_left_behind()):
            try:
                self.saves.on_sealed(session, seal)
            except BadMessage as error:
                logger.warning("job %s: rank %d left %s", self.name, session.rank, error)

    def _retire(self, session: Session) -> None:
        session.live = False
        self._retired.append(session)
        self._left_at_s = time.monotonic()
        self.log.session(session)
        self.release_retired()

    def release_retired(self) -> None:
        """Give up the arenas of ended sessions that no generation needs any more."""
        for session in list(self._retired):
            self._release(session, self.saves.busy_arenas | self.saves.outcomes.retained_arenas)
            if not session.arenas:
                self._retired.remove(session)
                self.log.session_over(session)

    def release_arenas(self, session: Session) -> None:
        """Give up a session's arenas that no generation needs, ahead of a new one."""
        if session.arenas.keys() & self.saves.outcomes.retained_arenas:
            self.saves.drop_retained()
        self._release(session, self.saves.busy_arenas)

    def _release(self, session: Session, kept: set[int]) -> None:
        for number in [number for number in session.arenas if number not in kept]:
            self.give_up_arena(session, number)

    def expire(self) -> None:
        """Give up what is kept in memory of a job that has left long ago."""
        if self.idle and time.monotonic() - self._left_at_s >= self._context.config.retain_s:
            self.saves.drop_retained()

    @property
    def retained_bytes_of_the_dead(self) -> int:
        """Shared memory that only keeps the last commit of ended sessions, and could be given up, in bytes."""
        busy = self.saves.busy_arenas
        arenas = [a for session in self._retired for a in session.arenas.values() if a.number not in busy]
        return sum(arena_bytes(arena.slots, arena.slot_bytes) for arena in arenas)

    @property
    def idle(self) -> bool:
        """Whether nobody is connected and nothing is in flight."""
        return not self.sessions and not self.saves.generations

    @property
    def resting(self) -> bool:
        """Whether it is idle and removes nothing either, so that its workers may end without being waited for."""
        return self.idle and not self.retention.busy

    @property
    def in_use(self) -> bool:
        """Whether it has processes or files."""
        return self.pool is not None or bool(self.files.directory) or not self.idle

    @property
    def empty(self) -> bool:
        """Whether it is idle and holds no memory."""
        return self.resting and not self._retired

    def check_deadlines(self) -> None:
        """Fail generations without news, and lose sessions that fell silent."""
        self.saves.check_deadlines()
        self.cache.tick()
        for session in list(self.sessions.values()):
            if session.silent_s > self._context.config.session_timeout_s:
                silent = DeadlineExceeded("the daemon heard nothing of this process", session.silent_s)
                self._context.send(session, Fenced(silent.report()))
                self.lose(session, f"was silent for {session.silent_s:.0f} s")
            elif not session.attached and session.client_has_ended:
                self.lose(session, "ended while no daemon ran")

    def forgive(self, late_s: float) -> None:
        """The daemon itself stood still for so long: no deadline ran meanwhile."""
        for session in self.sessions.values():
            session.heard_at_s += late_s
        for generation in self.saves.generations.values():
            generation.news_at_s += late_s

    async def rest(self) -> None:
        """End the workers; what lies in memory stays."""
        pools, self.pool, self._user_pool = (self.pool, self._user_pool), None, None
        for pool in pools:
            if pool is not None:
                await pool.close()
        await self.retention.close()

    async def close(self) -> None:
        """End the workers and remove the job's files: nothing of the job is left but its name."""
        self.saves.plans.put_in_force(None)
        self.saves.drop_retained()
        self.cache.close()
        for session in [*self.sessions.values(), *self._retired]:
            for number in list(session.arenas):
                self.give_up_arena(session, number)
        self._retired = []
        files, self.files = self.files, self._new_files()
        self.log.forget()
        await self.rest()
        files.remove()

    async def leave_to_successor(self) -> None:
        """End the workers; the next daemon goes on with what stands in the journal."""
        self.saves.leave()
        self.cache.close()
        await self.rest()
        await self.retention.close()

    def status(self) -> dict[str, object]:
        """Return what `/status` tells of the job."""
        sessions = sorted(self.sessions.values(), key=lambda session: session.rank)
        return {
            "job": self.name,
            "incarnation": self.roster.incarnation,
            "uid": self.owner.uid,
            "world_size": self.roster.world_size,
            "workers": self.worker_pids,
            "interval_s": self.saves.watch.rhythm.interval_s,
            "sessions": [session.status() for session in sessions],
            "generations": self.saves.status(),
            "retention": self.retention.status(),
            "retained": self._retained_status(),
        }

    def _retained_status(self) -> dict[str, object] | None:
        retained = self.saves.outcomes.retained
        if retained is None:
            return None
        return {
            "save_id": retained.save_id,
            "checkpoint_id": retained.rules.checkpoint_id,
            "bytes": sum(seal.message.image_bytes for seal in retained.seals.values()),
        }
