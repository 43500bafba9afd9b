"""What a daemon does with the journal of one that was killed: makes its jobs, sessions and generations anew.

Invariants: a generation that all ranks had sealed is finished; one of which a rank is missing waits for that rank only
if its client still lives; what was only being staged is free again.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Iterator

import msgspec

from ckptd.daemon.job.crew import JobContext
from ckptd.daemon.job.generation import CurrentPlan, Generation, RankWaves, Seal
from ckptd.daemon.job.jobs import Job, Owner
from ckptd.daemon.job.outcomes import Verdict, lies_whole_in_slots
from ckptd.daemon.job.waves import wave_of
from ckptd.daemon.recovery.job_log import JobLog
from ckptd.daemon.recovery.journal import Journal
from ckptd.daemon.recovery.records import (
    TABLES,
    ArenaRecord,
    GenerationRecord,
    JobRecord,
    PlanRecord,
    SealRecord,
    SessionRecord,
    VerdictRecord,
    WaveRecord,
    WrittenRecord,
)
from ckptd.daemon.session.sessions import ArenaFile, Peer, Session, identity_of
from ckptd.protocol import messages
from ckptd.protocol.errors import CkptdError, SystemCallFailed, from_report
from ckptd.protocol.messages import Sealed, WriteDone
from ckptd.protocol.save import SaveRules
from ckptd.protocol.wave_messages import WaveSealed
from ckptd.protocol.waves import WaveRing
from ckptd.staging.arena import SlotState, is_held, open_arena

logger = logging.getLogger(__name__)


def import_journal(directory: str, into: Journal) -> int:
    """Move the records of a dead daemon's journal into ours, with new numbers; return how many jobs there were.

    Nothing is moved while a client of that daemon lives: it waits for one in the same place.

    Args:
        directory: The dead daemon's state directory, whose lock is ours.
        into: Our journal.
    """
    other = Journal(directory)
    try:
        jobs = list(other.read(JobRecord))
        if any(_has_client(arena) for arena in other.read(ArenaRecord)):
            other.close()
            return 0
        number = next_number(into)
        renumbered = {job.job: number + offset for offset, job in enumerate(jobs)}
        for kind in TABLES:
            into.put(*(msgspec.structs.replace(r, job=renumbered[r.job]) for r in other.read(kind)))  # type: ignore[attr-defined]
    except BaseException:
        other.close()
        raise
    other.close(emptied=True)
    return len(jobs)


def next_number(journal: Journal) -> int:
    """Return a number that no job of the journal has."""
    return 1 + max((record.job for record in journal.read(JobRecord)), default=0)


def _has_client(arena: ArenaRecord) -> bool:
    descriptor = open_arena(arena.path, slots=arena.slots, slot_bytes=arena.slot_bytes)
    if descriptor is None:
        return False
    try:
        return is_held(descriptor)
    finally:
        os.close(descriptor)


def adopt_jobs(context: JobContext, *, since: int = 0) -> Iterator[Job]:
    """Yield the journal's jobs from number ``since`` on, each with its generations under way. Needs a running loop."""
    for record in list(context.journal.read(JobRecord)):
        if record.job >= since:
            yield adopt_job(record, context)


def adopt_job(record: JobRecord, context: JobContext) -> Job:
    """Make one job anew and take its generations up."""
    job = _Adopted(record, context).job
    generations = job.saves.generations.values()
    logger.info("adopted job %s: %d sessions, %d generations to finish", job.name, len(job.sessions), len(generations))
    return job


class _Adopted:
    """One job on its way from the journal."""

    def __init__(self, record: JobRecord, context: JobContext) -> None:
        self._journal, self._number = context.journal, record.job
        peer = Peer(0, record.uid, record.gid)
        self._owner = Owner(record.uid, record.gid, identity_of(peer))
        log = JobLog(context.journal, record.job)
        self.job = Job(record.name, self._owner, context=context, log=log, directory=record.directory)
        roster = self.job.roster
        roster.incarnation, roster.world_size, roster.launch = record.incarnation, record.world_size, record.launch
        self._arenas: dict[str, ArenaFile] = {}
        self._take_up_sessions()
        self._plans = self._take_up_plans()
        self._take_up_verdicts()
        self.job.open_pool()
        self._take_up_generations()
        for plan in self._plans.values():
            self.job.saves.plans.remove_unneeded(plan)
        self.job.take_up_seals()

    def _take_up_sessions(self) -> None:
        sessions: dict[bytes, Session] = {}
        for row in self._journal.read(SessionRecord, job=self._number):
            peer = Peer(row.pid, self._owner.uid, self._owner.gid, row.started_ticks)
            sessions[row.token] = Session(
                peer,
                self._owner.identity,
                row.rank,
                row.incarnation,
                token=row.token,
                live=row.live,
                attached=False,
            )
        for arena in self._journal.read(ArenaRecord, job=self._number):
            descriptor = open_arena(arena.path, slots=arena.slots, slot_bytes=arena.slot_bytes)
            if descriptor is None or arena.token not in sessions:
                self.job.log.arena_over(arena.path)
                continue
            file = ArenaFile(arena.number, arena.path, descriptor, arena.slots, arena.slot_bytes)
            self._arenas[arena.path] = sessions[arena.token].arenas[arena.number] = file
        for session in sessions.values():
            self.job.take_up(session)

    def _take_up_plans(self) -> dict[str, CurrentPlan]:
        plans: dict[str, CurrentPlan] = {}
        for row in self._journal.read(PlanRecord, job=self._number):
            if not os.path.exists(row.path):
                self.job.log.plan_over(row.path)
                continue
            plan = CurrentPlan(
                row.path,
                tuple(msgspec.msgpack.decode(row.digests, type=list[str])),
                tuple(msgspec.msgpack.decode(row.image_bytes, type=list[int])),
                (row.incarnation, row.sequence),
                row.committed,
            )
            plans[row.path] = plan
            if row.in_force:
                self.job.saves.plans.in_force = plan
        return plans

    def _take_up_verdicts(self) -> None:
        for row in self._journal.read(VerdictRecord, job=self._number):
            error = messages.decode_error(row.error) if row.error else None
            self.job.saves.outcomes.verdicts[row.incarnation, row.sequence] = Verdict(row.save_id, error, row.metadata)

    def _take_up_generations(self) -> None:
        rows = list(self._journal.read(GenerationRecord, job=self._number))
        rows.sort(key=lambda row: (row.begun_unix_s, row.incarnation, row.sequence))
        generations = [(row, self._generation(row)) for row in rows]
        self._free_slots_of_nobody([generation for _, generation in generations])
        for row, generation in generations:
            lost = self._lost_seal(row, generation)
            if row.state == "committed":
                self._keep(generation, whole=lost is None)
            elif row.state == "failed" or lost is not None:
                error = from_report(messages.decode_error(row.error)) if row.error else lost
                assert error is not None
                self.job.saves.finish_failing(generation, error)
            else:
                self.job.saves.go_on_with(generation)

    def _generation(self, row: GenerationRecord) -> Generation:
        key = (row.incarnation, row.sequence)
        made_for_it = [plan for plan in self._plans.values() if plan.made_for == key]
        plan = made_for_it[-1] if made_for_it else self._plans.get(row.plan_path)
        known, known_bytes = ((), ()) if plan is None else (plan.digests, plan.image_bytes)
        generation = Generation(
            row.incarnation,
            row.sequence,
            row.save_id,
            SaveRules(row.world_size, known, known_bytes, checkpoint_id=row.checkpoint_id),
            plan,
            begun_unix_s=row.begun_unix_s,
            begun_at_s=time.monotonic() - max(0.0, time.time() - row.begun_unix_s),
        )
        where = {"job": row.job, "incarnation": row.incarnation, "sequence": row.sequence}
        for seal in self._journal.read(SealRecord, **where):
            message = messages.decode_client_message(seal.message)
            arena = self._arenas.get(seal.arena_path)
            if arena is not None and isinstance(message, Sealed):
                generation.seals[seal.rank] = Seal(message, arena)
        for wave in self._journal.read(WaveRecord, **where):
            self._take_up_wave(generation, wave)
        for written in self._journal.read(WrittenRecord, **where):
            done = messages.decode_task_reply(written.done)
            if isinstance(done, WriteDone):
                generation.written[written.rank] = done
                generation.bytes_done[written.rank] = done.bytes_written
        return generation

    def _take_up_wave(self, generation: Generation, row: WaveRecord) -> None:
        message, arena = messages.decode_client_message(row.message), self._arenas.get(row.arena_path)
        if arena is None or not isinstance(message, Sealed | WaveSealed):
            return
        if row.rank not in generation.waves:
            generation.waves[row.rank] = RankWaves(WaveRing(message.image_bytes), arena)
        generation.waves[row.rank].left.append((wave_of(message), row.written))

    def _lost_seal(self, row: GenerationRecord, generation: Generation) -> CkptdError | None:
        """Return why a generation cannot be finished, if an arena of it is gone: somebody has cleaned tmpfs."""
        where = {"job": row.job, "incarnation": row.incarnation, "sequence": row.sequence}
        for seal in self._journal.read(SealRecord, **where):
            if seal.rank not in generation.seals:
                return SystemCallFailed("open", seal.arena_path, errno.ENOENT)
        for wave in self._journal.read(WaveRecord, **where):
            if wave.arena_path not in self._arenas and not wave.written:
                return SystemCallFailed("open", wave.arena_path, errno.ENOENT)
        return None

    def _keep(self, generation: Generation, *, whole: bool) -> None:
        """Take up a committed generation: its slots are free, but hold its image."""
        generation.rules.sealed.update(generation.seals)
        retain = whole and lies_whole_in_slots(generation)
        for seal in generation.seals.values():
            if list(seal.arena.states())[seal.message.slot] == (SlotState.PERSISTING, generation.sequence):
                free = SlotState.RETAINED if retain else SlotState.FREE
                seal.arena.set_state(seal.message.slot, free, generation.sequence)
        if retain:
            self.job.saves.outcomes.retain(generation)
        else:
            self.job.log.over(generation)

    def _free_slots_of_nobody(self, generations: list[Generation]) -> None:
        """Free what was being written for a generation that has ended; seals that nobody has heard of stay."""
        needed: dict[tuple[str, int], int] = {}
        for generation in generations:
            for seal in generation.seals.values():
                if not seal.message.wave_bytes:
                    needed[seal.arena.path, seal.message.slot] = generation.sequence
            for waves in generation.waves.values():
                needed |= {(waves.arena.path, w.slot): generation.sequence for w, written in waves.left if not written}
        for arena in self._arenas.values():
            for slot, (state, sequence) in enumerate(arena.states()):
                if state is SlotState.PERSISTING and needed.get((arena.path, slot)) != sequence:
                    arena.set_state(slot, SlotState.FREE)
