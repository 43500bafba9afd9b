"""The saves of one job: turns the actions of the save rules into messages to ranks and tasks for workers.

Invariants: every generation ends and is announced to all live ranks alike; commits happen in the order of the saves; a
sealed generation goes on whatever becomes of its ranks.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Final, Protocol, cast

from ckptd import __version__
from ckptd.checkpoint.names import image_name, is_canonical
from ckptd.daemon.config import Config
from ckptd.daemon.generation import CurrentPlan, Generation, Seal, hand_over_task
from ckptd.daemon.jobfiles import JobFiles
from ckptd.daemon.metrics import Metrics
from ckptd.daemon.sessions import Session
from ckptd.daemon.supervisor import WorkerPool
from ckptd.daemon.watch import SaveWatch
from ckptd.protocol import save as rules
from ckptd.protocol.errors import (
    BadMessage,
    CkptdError,
    DeadlineExceeded,
    ErrorReport,
    RankLost,
    ShuttingDown,
    UnexpectedError,
    from_report,
)
from ckptd.protocol.messages import (
    Aborted,
    Assigned,
    CommitDone,
    CommitTask,
    Committed,
    DaemonMessage,
    DiscardTask,
    GaveUp,
    HandOverDone,
    PlanDone,
    PlanTask,
    Progress,
    Propose,
    Sealed,
    SlotFreed,
    WriteDone,
    WriteTask,
)
from ckptd.protocol.session import Roster
from ckptd.staging.arena import SlotState, slot_offset

logger = logging.getLogger(__name__)

_HISTORY: Final = 32
# A rank that lags may speak of a save that has ended; more than a few saves behind, its slots would be busy.
_VERDICTS: Final = 256


class Send(Protocol):
    """How a job speaks to its ranks."""

    def __call__(self, session: Session, message: DaemonMessage) -> None:
        """Send ``message``; a session that is gone is no error."""


@dataclass(frozen=True)
class JobContext:
    """What all jobs of a daemon share. ``root``: its directory on tmpfs; ``user_code``: whether users' code may run."""

    config: Config
    metrics: Metrics
    send: Send
    root: str
    user_code: bool = True


class Crew(Protocol):
    """Who takes part in a job's saves, and what they share."""

    name: str
    roster: Roster
    sessions: dict[int, Session]
    files: JobFiles
    pool: WorkerPool | None
    progress_timeout_s: float

    def open_user_pool(self) -> WorkerPool:
        """Return the worker for users' own code. Raises Unsupported where none may run."""

    def release_retired(self) -> None:
        """A generation ended: arenas of ended sessions may no longer be needed."""


class Saves:
    """The generations of one job.

    Args:
        crew: The job.
        context: What it shares with the other jobs.
    """

    def __init__(self, crew: Crew, context: JobContext) -> None:
        self._crew = crew
        self._config, self._send = context.config, context.send
        self.watch = SaveWatch(context.metrics)
        self.generations: dict[tuple[int, int], Generation] = {}
        self.history: deque[dict[str, object]] = deque(maxlen=_HISTORY)
        self._verdicts: dict[tuple[int, int], ErrorReport | None] = {}
        self._plan: CurrentPlan | None = None
        self._plan_committed = False
        self._plans_made = 0
        self._stopping = False

    @property
    def busy_arenas(self) -> set[int]:
        """Numbers of the arenas that generations in flight still need."""
        return {seal.arena.number for g in self.generations.values() for seal in g.seals.values()}

    def forget_plan(self) -> None:
        """The job's ranks, or its files, are new: plan anew."""
        self._plan, self._plan_committed = None, False

    def fail_incomplete(self, error: CkptdError) -> None:
        """Fail every generation that is not sealed by all ranks."""
        for generation in list(self.generations.values()):
            if generation.rules.unsealed():
                self._apply(generation, rules.Broke(error))

    def stop_collecting(self) -> None:
        """The daemon is stopping: what is not sealed fails, and nothing new is taken."""
        self._stopping = True
        self.fail_incomplete(ShuttingDown())

    def rank_fell(self, session: Session, reason: str) -> None:
        """A rank's session ended: what it has not sealed can never be complete."""
        fell = rules.RankFell(session.rank, RankLost(session.rank, session.peer.pid, reason))
        for generation in list(self.generations.values()):
            if generation.incarnation == session.incarnation:
                self._apply(generation, fell)

    def check_deadlines(self) -> None:
        """Fail generations without news."""
        now = time.monotonic()
        for generation in list(self.generations.values()):
            silent_s = now - generation.news_at_s
            # A commit has its worker's deadline: given up from outside it might be published all the same.
            committing = generation.rules.state is rules.State.COMMITTING
            if silent_s > self._crew.progress_timeout_s and not committing:
                error = DeadlineExceeded(generation.waiting_for(), silent_s)
                self._apply(generation, rules.Broke(error))

    def status(self) -> list[dict[str, object]]:
        """Return the last generations and those in flight."""
        running = [g.status() for g in self.generations.values() if not g.dry and g.ended_at_s is None]
        return [*self.history, *running]

    # --- messages ------------------------------------------------------------------------------------------------

    def on_propose(self, session: Session, message: Propose) -> None:
        """A rank holds items that no plan in force describes."""
        generation = self._generation(session, message)
        if generation is None:
            return
        generation.dry = message.dry
        generation.proposals[session.rank] = message
        self._apply(generation, rules.Proposed(session.rank, message.checkpoint_id, message.digest))

    def on_sealed(self, session: Session, message: Sealed) -> None:
        """A rank's image is complete. Raises BadMessage if the slot is not this session's."""
        arena = session.check(message)
        generation = self._generation(session, message)
        if generation is None:
            arena.set_state(message.slot, SlotState.FREE)
            self._send(session, SlotFreed(message.arena, message.slot))
            return
        if session.rank in generation.seals:
            return
        generation.seals[session.rank] = Seal(message, arena)
        self.watch.sealed(generation, session.rank, message)
        if message.code_bytes:
            self._apply(generation, rules.RankHandedOver(session.rank, message.checkpoint_id))
            return
        event = rules.RankSealed(session.rank, message.checkpoint_id, message.digest, message.image_bytes)
        self._apply(generation, event)

    def on_gave_up(self, session: Session, message: GaveUp) -> None:
        """A rank will not stage its part."""
        generation = self._generation(session, message)
        if generation is not None:
            self._apply(generation, rules.RankFell(session.rank, from_report(message.error)))

    def _generation(self, session: Session, message: Propose | Sealed | GaveUp) -> Generation | None:
        """Return the generation that a message speaks of; None if it has ended, which the rank is told again."""
        # What a user's own writer takes for an id is its own affair; no path is made of it here.
        handed_over = isinstance(message, Sealed) and message.code_bytes > 0
        if not (handed_over or isinstance(message, GaveUp) or is_canonical(message.checkpoint_id)):
            raise BadMessage(f"checkpoint id {message.checkpoint_id!r}, which is no absolute path")
        key = (session.incarnation, message.sequence)
        if key in self._verdicts:
            error = self._verdicts[key]
            if error is not None:
                self._send(session, Aborted(message.sequence, error, replan=True))
            return None
        generation = self.generations.get(key)
        if generation is None and self._stopping:
            self._send(session, Aborted(message.sequence, ShuttingDown().report(), replan=True))
            return None
        if generation is None:
            plan = self._plan
            known = () if plan is None else plan.digests
            known_bytes = () if plan is None else plan.image_bytes
            generation = Generation(
                session.incarnation,
                message.sequence,
                f"{_file_part(self._crew.name)}-{session.incarnation}-{message.sequence}-{secrets.token_hex(4)}",
                rules.SaveRules(self._crew.roster.world_size, known, known_bytes),
                plan,
            )
            self.generations[key] = generation
            self._fail_for_absent(generation)
        elif generation.rules.error is not None:
            # Told already, but perhaps before this rank had begun the save, and so to nobody.
            self._send(session, Aborted(message.sequence, generation.rules.error.report(), replan=True))
        return generation

    def _fail_for_absent(self, generation: Generation) -> None:
        """A rank that has left takes part in no later save of its incarnation: say so at once."""
        for rank, seat in self._crew.roster.seats.items():
            if not seat.live and generation.incarnation == self._crew.roster.incarnation:
                lost = RankLost(rank, seat.pid, "has left the job")
                asyncio.get_running_loop().call_soon(self._apply, generation, rules.RankFell(rank, lost))

    # --- actions -------------------------------------------------------------------------------------------------

    def _apply(self, generation: Generation, event: rules.Event) -> None:
        generation.note_news()
        for action in generation.rules.handle(event):
            match action:
                case rules.MakePlan():
                    self._begin(generation, self._make_plan(generation, action.fixed))
                case rules.Assign():
                    self._assign(generation, action.rank)
                case rules.Write():
                    self._begin(generation, self._write(generation, action.rank))
                case rules.Commit():
                    self._begin(generation, self._commit(generation))
                case rules.SaveHandedOver():
                    self._begin(generation, self._save_handed_over(generation))
                case rules.AnnounceCommit():
                    self._announce_commit(generation)
                case rules.Abandon():
                    self._abandon(generation, action)

    def _begin(self, generation: Generation, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(self._guard(generation, work))
        generation.work.add(task)
        task.add_done_callback(generation.work.discard)

    async def _guard(self, generation: Generation, work: Coroutine[object, object, None]) -> None:
        """Run work for a generation: whatever happens to it, the generation ends."""
        try:
            await work
        except CkptdError as error:
            self._apply(generation, rules.Broke(error))
        except Exception as bug:  # the bulkhead around one generation: a bug costs one save
            logger.exception("bug in job %s, save %d", self._crew.name, generation.sequence)
            self._apply(generation, rules.Broke(UnexpectedError(f"internal error: {bug!r}; see the daemon's log")))

    async def _make_plan(self, generation: Generation, fixed: frozenset[int]) -> None:
        pool, base = self._pool(), generation.plan
        ranks = range(self._crew.roster.world_size)
        proposals = [base.proposals[r] if r in fixed and base else generation.proposals[r].plan for r in ranks]
        staged = [base.done.assigned[r] if r in fixed and base else None for r in ranks]
        digests = tuple(base.digests[r] if r in fixed and base else generation.proposals[r].digest for r in ranks)
        self._plans_made += 1
        path = self._crew.files.path(f"{self._plans_made}.plan")
        done = cast(PlanDone, await pool.run(PlanTask(path, proposals, staged)))
        plan = CurrentPlan(path, digests, tuple(proposals), done)
        generation.plan = plan
        if generation.incarnation == self._crew.roster.incarnation:
            self._plan, self._plan_committed = plan, False
        self._apply(generation, rules.Planned(plan.digests, plan.image_bytes))
        if generation.dry:
            self._end(generation)

    def _assign(self, generation: Generation, rank: int) -> None:
        plan = generation.plan
        session = self._crew.sessions.get(rank)
        if plan is not None and session is not None:
            self._send(session, Assigned(generation.sequence, plan.digests[rank], plan.done.assigned[rank]))

    async def _write(self, generation: Generation, rank: int) -> None:
        """Have a rank's image written."""
        seal = generation.seals[rank]
        message, plan = seal.message, generation.plan
        if plan is None:
            raise UnexpectedError("a seal without a plan")
        seal.arena.set_state(message.slot, SlotState.PERSISTING, generation.sequence)
        task = WriteTask(
            plan_path=plan.path,
            rank=rank,
            arena_path=seal.arena.path,
            image_offset=slot_offset(message.slot, seal.arena.slot_bytes) + message.control_bytes,
            image_bytes=message.image_bytes,
            object_bytes=message.object_bytes,
            directory=generation.directory,
            file=image_name(rank),
            threads=self._config.write_threads,
            chunk_bytes=self._config.write_chunk_bytes,
        )
        try:
            reply = await self._pool().run(
                task,
                on_progress=lambda done: self._progress(generation, rank, done),
                on_start=lambda waited: self.watch.writing_began(generation, waited),
            )
        except CkptdError as error:
            self._apply(generation, rules.Broke(error, rank))
            return
        done = cast(WriteDone, reply)
        generation.written[rank] = done
        self.watch.written(generation, done)
        self._progress(generation, rank, done.bytes_written)
        self._apply(generation, rules.ImageWritten(rank, done.bytes_written))

    def _progress(self, generation: Generation, rank: int, bytes_done: int) -> None:
        generation.bytes_done[rank] = bytes_done
        generation.note_news()
        news = Progress(generation.sequence, sum(generation.bytes_done.values()), generation.bytes_total)
        self._tell(generation, news)

    async def _save_handed_over(self, generation: Generation) -> None:
        """Have the planners and writers that the ranks handed over save what is staged."""
        await self._older_ones_end(generation)
        begun = time.monotonic()
        for seal in generation.seals.values():
            seal.arena.set_state(seal.message.slot, SlotState.PERSISTING, generation.sequence)
        pool = self._crew.open_user_pool()
        done = cast(
            HandOverDone, await pool.run(hand_over_task(generation), on_progress=lambda _: generation.note_news())
        )
        generation.metadata = done.metadata
        self.watch.handed_over(generation, time.monotonic() - begun)
        self.watch.committed(generation, generation.bytes_total)
        self._apply(generation, rules.Published())

    async def _older_ones_end(self, generation: Generation) -> None:
        for older in list(self.generations.values()):
            if older is not generation and older.begun_at_s < generation.begun_at_s:
                await older.ended.wait()
        generation.note_news()

    async def _commit(self, generation: Generation) -> None:
        await self._older_ones_end(generation)
        begun = time.monotonic()
        plan = generation.plan
        if plan is None:
            raise UnexpectedError("a commit without a plan")
        ranks = range(generation.rules.world_size)
        task = CommitTask(
            plan_path=plan.path,
            directory=generation.directory,
            checkpoint_id=generation.rules.checkpoint_id,
            save_id=generation.save_id,
            hashes=[generation.written[rank].hashes for rank in ranks],
            frame_hashes=[generation.written[rank].frame_hash for rank in ranks],
            object_bytes=[generation.seals[rank].message.object_bytes for rank in ranks],
            overwrite=all(seal.message.overwrite for seal in generation.seals.values()),
            header={
                "version": __version__,
                "job": self._crew.name,
                "incarnation": str(generation.incarnation),
                "sequence": str(generation.sequence),
                "save_id": generation.save_id,
                "world_size": str(generation.rules.world_size),
            },
        )
        done = cast(CommitDone, await self._pool().run(task))
        self.watch.took(generation, "commit", time.monotonic() - begun)
        if plan is self._plan:
            self._plan_committed = True
        self.watch.committed(generation, done.bytes_total)
        self._apply(generation, rules.Published())

    def _announce_commit(self, generation: Generation) -> None:
        logger.info(
            "committed %s (job %s, save %d): %d bytes in %.3f s",
            generation.rules.checkpoint_id, self._crew.name, generation.sequence,
            generation.bytes_total, generation.seconds,
        )  # fmt: skip
        self._tell(generation, Committed(generation.sequence, generation.save_id, generation.metadata))
        self._end(generation)

    def _abandon(self, generation: Generation, action: rules.Abandon) -> None:
        logger.warning(
            "failed %s (job %s, save %d): %s",
            generation.rules.checkpoint_id, self._crew.name, generation.sequence, action.error,
        )  # fmt: skip
        self.watch.failed(action.error)
        replan = action.replan or not self._plan_committed
        if replan and generation.incarnation == self._crew.roster.incarnation:
            self._plan, self._plan_committed = None, False  # a plan enters the cache only after a commit
        self._tell(generation, Aborted(generation.sequence, action.error.report(), replan))
        writers = [task for task in generation.work if task is not asyncio.current_task()]
        cleaning = asyncio.create_task(self._clean_up(generation, writers))
        generation.work.add(cleaning)

    async def _clean_up(self, generation: Generation, writers: list[asyncio.Task[None]]) -> None:
        """Once nobody writes any more, remove what was written and give the slots back."""
        for task in writers:
            task.cancel()  # what has begun is waited for all the same: two workers must not meet in one directory
        await asyncio.gather(*writers, return_exceptions=True)
        if generation.seals and not generation.rules.handed_over and self._crew.pool is not None:
            try:
                await self._crew.pool.run(DiscardTask(generation.directory))
            except CkptdError as error:
                logger.warning("could not remove %s: %s", generation.directory, error)
        self._end(generation)

    def _end(self, generation: Generation) -> None:
        generation.ended_at_s = time.monotonic()
        if not generation.dry:
            self.history.append(generation.status())
        self._free_slots(generation)
        key = (generation.incarnation, generation.sequence)
        self.generations.pop(key, None)
        error = generation.rules.error
        self._verdicts[key] = None if error is None else error.report()
        while len(self._verdicts) > _VERDICTS:
            del self._verdicts[next(iter(self._verdicts))]
        generation.ended.set()
        self._crew.release_retired()

    def _free_slots(self, generation: Generation) -> None:
        for rank, seal in generation.seals.items():
            seal.arena.set_state(seal.message.slot, SlotState.FREE)
            session = self._crew.sessions.get(rank)
            if session is not None and seal.arena.number in session.arenas:
                self._send(session, SlotFreed(seal.message.arena, seal.message.slot))

    def _tell(self, generation: Generation, message: DaemonMessage) -> None:
        for session in self._crew.sessions.values():
            if session.incarnation == generation.incarnation:
                self._send(session, message)

    def _pool(self) -> WorkerPool:
        if self._crew.pool is None:
            raise ShuttingDown
        return self._crew.pool


def _file_part(job: str) -> str:
    """Return a short form of a job's name that can stand in a file name."""
    return "".join(c if c.isalnum() else "_" for c in job)[:24]
