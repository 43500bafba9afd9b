"""The saves of one job: turns the actions of the save rules into messages to ranks and tasks for workers.

Invariants: every generation ends and is announced to all live ranks alike; commits happen in the order of the saves; a
sealed generation goes on whatever becomes of its ranks.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Coroutine
from typing import cast

from ckptd.checkpoint.names import is_canonical
from ckptd.daemon.job.crew import Crew, JobContext
from ckptd.daemon.job.generation import CurrentPlan, Generation, Seal
from ckptd.daemon.job.outcomes import Outcomes, Verdict
from ckptd.daemon.job.plans import Plans
from ckptd.daemon.job.waves import SaveHooks, Waves
from ckptd.daemon.monitoring.watch import SaveWatch
from ckptd.daemon.session.sessions import Session
from ckptd.daemon.workers.retries import Retrying
from ckptd.daemon.workers.supervisor import WorkerPool
from ckptd.daemon.workers.tasks import commit_task, hand_over_task, plan_of, plan_task, write_task
from ckptd.protocol import save as rules
from ckptd.protocol.crash_points import CrashPoint, reach
from ckptd.protocol.errors import (
    BadMessage,
    CkptdError,
    DeadlineExceeded,
    RankLost,
    ShuttingDown,
    UnexpectedError,
    from_report,
)
from ckptd.protocol.messages import (
    Aborted,
    Assigned,
    CommitDone,
    Committed,
    DaemonMessage,
    DiscardTask,
    GaveUp,
    HandOverDone,
    PlanDone,
    PlanRanks,
    Progress,
    Propose,
    Sealed,
    SlotFreed,
    WriteDone,
    WriteTask,
)
from ckptd.protocol.wave_messages import FinishWavesTask, WaveSealed
from ckptd.staging.arena import SlotState

logger = logging.getLogger(__name__)


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
        self.outcomes = Outcomes(crew.log)
        self.plans = Plans(crew.log, lambda: [plan for g in self.generations.values() for plan in g.plans])
        self._stopping = False
        self._left = False
        hooks = SaveHooks(self._begin, self._fail_rank, self._progress, self._pool, self._send)
        self._waves = Waves(crew, self._config, hooks)

    def ids_in_flight(self) -> list[str]:
        """Ids of the checkpoints that are being saved."""
        return [generation.rules.checkpoint_id for generation in self.generations.values()]

    @property
    def busy_arenas(self) -> set[int]:
        """Numbers of the arenas that generations in flight still need."""
        running = self.generations.values()
        sealed = {seal.arena.number for g in running for seal in g.seals.values()}
        return sealed | {waves.arena.number for g in running for waves in g.waves.values()}

    def drop_retained(self) -> None:
        """The memory of the last commit is wanted."""
        if self.outcomes.drop_retained():
            self._crew.release_retired()

    def fail_incomplete(self, error: CkptdError) -> None:
        """Fail every generation that is not sealed by all ranks."""
        for generation in list(self.generations.values()):
            if generation.rules.unsealed():
                self._apply(generation, rules.Broke(error))

    def stop_collecting(self) -> None:
        """The daemon is stopping: what is not sealed fails, and nothing new is taken."""
        self._stopping = True
        self.fail_incomplete(ShuttingDown())

    def leave(self) -> None:
        """What is under way is for the next daemon: the end of our workers is no failure of it."""
        self._left = True

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
        return [*self.outcomes.history, *running]

    def go_on_with(self, generation: Generation) -> None:
        """Take up a generation that a daemon before this one has left: say again what had happened to it.

        Its seals, and what was written of it, are known already; the rules ask for whatever is still to be done.
        """
        self.generations[(generation.incarnation, generation.sequence)] = generation
        for rank in list(generation.waves):
            self._waves.go_on(generation, rank)
        for rank, seal in list(generation.seals.items()):
            self._apply(generation, _sealed_event(rank, seal.message))

    def finish_failing(self, generation: Generation, error: CkptdError) -> None:
        """Take up a generation that had failed, and of which files may be left."""
        self.generations[(generation.incarnation, generation.sequence)] = generation
        self._apply(generation, rules.Broke(error))

    # --- messages ------------------------------------------------------------------------------------------------

    def on_propose(self, session: Session, message: Propose) -> None:
        """A rank holds items that no plan in force describes."""
        reach(CrashPoint.DAEMON_PROPOSED)
        plan = self.plans.in_force
        made_for = (session.incarnation, message.sequence)
        if plan is not None and plan.made_for == made_for and plan.digests[session.rank] == message.digest:
            # Asked again: the answer may have been lost with the daemon before this one.
            self._tell_assignment(session, message.sequence, plan)
            return
        generation = self._generation(session, message)
        if generation is None:
            return
        generation.dry = message.dry
        generation.proposals[session.rank] = message
        self._apply(generation, rules.Proposed(session.rank, message.checkpoint_id, message.digest))

    def on_sealed(self, session: Session, message: Sealed | WaveSealed) -> None:
        """A rank's image, or a wave of it, is complete. Raises BadMessage if the slot is not this session's."""
        arena = session.check(message)
        generation = self._generation(session, message)
        if generation is None:
            arena.set_state(message.slot, SlotState.FREE)
            self._send(session, SlotFreed(message.arena, message.slot))
            return
        if session.rank in generation.seals and isinstance(message, Sealed):
            return
        reach(CrashPoint.DAEMON_SEAL_HEARD)
        generation.rules.checkpoint_id = generation.rules.checkpoint_id or message.checkpoint_id
        if isinstance(message, WaveSealed) or message.wave_bytes:
            stages = (session.rank, message.checkpoint_id, message.digest, message.image_bytes)
            self._apply(generation, rules.RankStages(*stages))
            self._waves.take(generation, session.rank, message, arena)
            if isinstance(message, WaveSealed) or generation.rules.decided:
                return
        generation.seals[session.rank] = seal = Seal(message, arena)
        self._crew.log.sealed(generation, session.rank, seal)
        reach(CrashPoint.DAEMON_SEAL_JOURNALED)
        self.watch.sealed(generation, session.rank, message)
        self._apply(generation, _sealed_event(session.rank, message))

    def on_gave_up(self, session: Session, message: GaveUp) -> None:
        """A rank will not stage its part."""
        generation = self._generation(session, message)
        if generation is not None:
            generation.rules.checkpoint_id = generation.rules.checkpoint_id or message.checkpoint_id
            self._apply(generation, rules.RankFell(session.rank, from_report(message.error)))

    def _generation(self, session: Session, message: Propose | Sealed | WaveSealed | GaveUp) -> Generation | None:
        """Return the generation that a message speaks of; None if it has ended, which the rank is told again."""
        # What a user's own writer takes for an id is its own affair; no path is made of it here.
        handed_over = isinstance(message, Sealed) and message.code_bytes > 0
        if not (handed_over or isinstance(message, GaveUp) or is_canonical(message.checkpoint_id)):
            raise BadMessage(f"checkpoint id {message.checkpoint_id!r}, which is no absolute path")
        key = (session.incarnation, message.sequence)
        if key in self.outcomes.verdicts:
            self._tell_verdict(session, message.sequence, self.outcomes.verdicts[key])
            return None
        generation = self.generations.get(key)
        if generation is None and self._stopping:
            self._send(session, Aborted(message.sequence, ShuttingDown().report(), replan=True))
            return None
        if generation is None:
            plan = self.plans.in_force
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

    def _tell_verdict(self, session: Session, sequence: int, verdict: Verdict) -> None:
        if verdict.error is None:
            self._send(session, Committed(sequence, verdict.save_id, verdict.metadata))
        else:
            self._send(session, Aborted(sequence, verdict.error, replan=True))

    def _fail_for_absent(self, generation: Generation) -> None:
        """A rank that has left takes part in no later save of its incarnation: say so at once."""
        for rank, seat in self._crew.roster.seats.items():
            if not seat.live and generation.incarnation == self._crew.roster.incarnation:
                lost = RankLost(rank, seat.pid, "has left the job")
                asyncio.get_running_loop().call_soon(self._apply, generation, rules.RankFell(rank, lost))

    # --- actions -------------------------------------------------------------------------------------------------

    def _apply(self, generation: Generation, event: rules.Event) -> None:
        if self._left:
            return
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
        path = self._crew.files.path(f"{secrets.token_hex(6)}.plan")
        task = plan_task(path, generation, world_size=self._crew.roster.world_size, fixed=fixed)
        done = cast(PlanDone, await self._pool().run(task))
        reach(CrashPoint.DAEMON_PLANNED)
        made_for = (generation.incarnation, generation.sequence)
        ranks = PlanRanks(task.plans, done.assigned)
        plan = CurrentPlan(path, tuple(task.digests), tuple(done.image_bytes), made_for, _ranks=ranks)
        generation.older_plans, generation.plan = generation.plans, plan
        in_force = generation.incarnation == self._crew.roster.incarnation
        self._crew.log.plan(plan, in_force=in_force)
        reach(CrashPoint.DAEMON_PLAN_JOURNALED)
        if in_force:
            self.plans.put_in_force(plan)
        self._apply(generation, rules.Planned(plan.digests, plan.image_bytes))
        reach(CrashPoint.DAEMON_ASSIGNED)
        if generation.dry:
            self._end(generation)

    def _assign(self, generation: Generation, rank: int) -> None:
        session = self._crew.sessions.get(rank)
        if session is not None:
            self._tell_assignment(session, generation.sequence, plan_of(generation))

    def _tell_assignment(self, session: Session, sequence: int, plan: CurrentPlan) -> None:
        rank = session.rank
        mine, job_bytes = plan.ranks().assigned[rank], sum(plan.image_bytes)
        self._send(session, Assigned(sequence, plan.digests[rank], mine, job_bytes))

    async def _write(self, generation: Generation, rank: int) -> None:
        """Have a rank's image written, unless it was before a restart."""
        known = generation.written.get(rank)
        if known is not None:
            self._apply(generation, rules.ImageWritten(rank, known.bytes_written))
            return
        seal = generation.seals[rank]
        if seal.message.wave_bytes:
            await self._make_durable(generation, rank, await self._waves.finish(generation, rank))
            return
        seal.arena.set_state(seal.message.slot, SlotState.PERSISTING, generation.sequence)
        task = write_task(generation, rank, self._config)
        reach(CrashPoint.DAEMON_WRITE_BEGUN)
        await self._make_durable(generation, rank, task)

    async def _make_durable(self, generation: Generation, rank: int, task: WriteTask | FinishWavesTask) -> None:
        try:
            pool = Retrying(self._pool, backoff=self._config.write_backoff, on_retry=self.watch.write_begun_anew)
            reply = await pool.run(
                task,
                on_progress=lambda done: self._progress(generation, rank, done),
                on_start=lambda waited: self.watch.writing_began(generation, waited),
            )
        except CkptdError as error:
            self._fail_rank(generation, rank, error)
            return
        done = cast(WriteDone, reply)
        reach(CrashPoint.DAEMON_WRITTEN)
        generation.written[rank] = done
        self._crew.log.written(generation, rank)
        reach(CrashPoint.DAEMON_WRITTEN_JOURNALED)
        self.watch.written(generation, done)
        self._progress(generation, rank, done.bytes_written)
        self._apply(generation, rules.ImageWritten(rank, done.bytes_written))

    def _fail_rank(self, generation: Generation, rank: int, error: CkptdError) -> None:
        self._apply(generation, rules.Broke(error, rank))

    def _progress(self, generation: Generation, rank: int, bytes_done: int) -> None:
        generation.bytes_done[rank] = bytes_done
        generation.timeline.writing_began()
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
        reach(CrashPoint.DAEMON_PUBLISHED)
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
        reach(CrashPoint.DAEMON_COMMITTING)
        done = cast(CommitDone, await self._pool().run(commit_task(generation, self._crew.name)))
        reach(CrashPoint.DAEMON_PUBLISHED)
        self.watch.took(generation, "commit", time.monotonic() - begun)
        self.plans.note_commit(plan_of(generation))
        self.watch.committed(generation, done.bytes_total)
        self._apply(generation, rules.Published())

    def _announce_commit(self, generation: Generation) -> None:
        logger.info(
            "committed %s (job %s, save %d): %d bytes in %.3f s",
            generation.rules.checkpoint_id, self._crew.name, generation.sequence,
            generation.bytes_total, generation.seconds,
        )  # fmt: skip
        self._crew.log.committed(generation)
        reach(CrashPoint.DAEMON_COMMIT_JOURNALED)
        self._end(generation)  # before it is told: who hears of it may save at once, and needs the slot
        self._tell(generation, Committed(generation.sequence, generation.save_id, generation.metadata))
        reach(CrashPoint.DAEMON_COMMIT_TOLD)
        if (keep := generation.keep) is not None:
            self._crew.retention.request(os.path.dirname(generation.rules.checkpoint_id), keep)

    def _abandon(self, generation: Generation, action: rules.Abandon) -> None:
        logger.warning(
            "failed %s (job %s, save %d): %s",
            generation.rules.checkpoint_id, self._crew.name, generation.sequence, action.error,
        )  # fmt: skip
        self.watch.failed(action.error)
        replan = True
        if generation.incarnation == self._crew.roster.incarnation:
            replan = self.plans.doubt(always=action.replan)
        self._crew.log.failed(generation, action.error.report())
        reach(CrashPoint.DAEMON_FAILURE_JOURNALED)
        self._tell(generation, Aborted(generation.sequence, action.error.report(), replan))
        writers = [task for task in generation.work if task is not asyncio.current_task()]
        reach(CrashPoint.DAEMON_FAILURE_TOLD)
        self._begin(generation, self._clean_up(generation, writers))

    async def _clean_up(self, generation: Generation, writers: list[asyncio.Task[None]]) -> None:
        """Once nobody writes any more, remove what was written and give the slots back."""
        for task in writers:
            task.cancel()  # what has begun is waited for all the same: two workers must not meet in one directory
        await asyncio.gather(*writers, return_exceptions=True)
        if self._left:
            return
        if (generation.seals or generation.waves) and not generation.rules.handed_over and self._crew.pool is not None:
            try:
                await self._crew.pool.run(DiscardTask(generation.directory))
            except CkptdError as error:
                logger.warning("could not remove %s: %s", generation.directory, error)
        reach(CrashPoint.DAEMON_DISCARDED)
        self._end(generation)

    def _end(self, generation: Generation) -> None:
        generation.ended_at_s = time.monotonic()
        self.generations.pop((generation.incarnation, generation.sequence), None)
        self.outcomes.end(generation, retain=generation.incarnation == self._crew.roster.incarnation)
        self._free_slots(generation)
        for plan in generation.plans:
            self.plans.remove_unneeded(plan)
        generation.ended.set()
        self._crew.release_retired()
        reach(CrashPoint.DAEMON_SLOTS_FREED)

    def _free_slots(self, generation: Generation) -> None:
        self._waves.release(generation)
        free = SlotState.RETAINED if generation is self.outcomes.retained else SlotState.FREE
        for rank, seal in generation.seals.items():
            if seal.message.wave_bytes:
                continue  # free since it was written, and perhaps in use again
            seal.arena.set_state(seal.message.slot, free, generation.sequence)
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


def _sealed_event(rank: int, seal: Sealed) -> rules.Event:
    if seal.code_bytes:
        return rules.RankHandedOver(rank, seal.checkpoint_id)
    return rules.RankSealed(rank, seal.checkpoint_id, seal.digest, seal.image_bytes)


def _file_part(job: str) -> str:
    """Return a short form of a job's name that can stand in a file name."""
    return "".join(c if c.isalnum() else "_" for c in job)[:24]
