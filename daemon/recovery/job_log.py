"""One job's part of the journal: what is written down when, in the words of sessions, plans and generations.

Invariant: what a rank, a worker or a client is told is in the journal before it is told.
"""

from __future__ import annotations

import msgspec

from ckptd.daemon.job.generation import CurrentPlan, Generation, Seal
from ckptd.daemon.recovery.journal import Journal
from ckptd.daemon.recovery.records import (
    TABLES,
    ArenaRecord,
    GenerationRecord,
    JobRecord,
    PlanRecord,
    Record,
    SealRecord,
    SessionRecord,
    VerdictRecord,
    WaveRecord,
    WrittenRecord,
)
from ckptd.daemon.session.sessions import ArenaFile, Session
from ckptd.protocol import messages
from ckptd.protocol.errors import ErrorReport
from ckptd.protocol.messages import Sealed
from ckptd.protocol.session import Roster
from ckptd.protocol.wave_messages import WaveSealed
from ckptd.protocol.waves import part_of


class JobLog:
    """Writes down what happens in one job.

    Args:
        journal: The daemon's.
        number: The job's number in the journal.
    """

    def __init__(self, journal: Journal, number: int) -> None:
        self._journal, self.number = journal, number

    # --- the job and its sessions --------------------------------------------------------------------------------

    def job(self, roster: Roster, *, uid: int, gid: int, directory: str) -> None:
        """The job is there, or its roster or its directory has changed."""
        self._journal.put(
            JobRecord(
                job=self.number,
                uid=uid,
                gid=gid,
                name=roster.job,
                directory=directory,
                incarnation=roster.incarnation,
                world_size=roster.world_size,
                launch=roster.launch,
            )
        )

    def forget(self) -> None:
        """The job is over, and nothing of it is left."""
        self._journal.change(removed=[(kind, {"job": self.number}) for kind in TABLES])

    def session(self, session: Session) -> None:
        """A session was opened, or has ended while its arenas are still needed."""
        self._journal.put(
            SessionRecord(
                token=session.token,
                job=self.number,
                rank=session.rank,
                incarnation=session.incarnation,
                pid=session.peer.pid,
                started_ticks=session.peer.started_ticks,
                live=session.live,
            )
        )

    def session_over(self, session: Session) -> None:
        """A session has ended and holds no arena."""
        self._journal.remove(SessionRecord, token=session.token)

    def arena(self, session: Session, arena: ArenaFile) -> None:
        """A session got an arena."""
        self._journal.put(
            ArenaRecord(
                path=arena.path,
                job=self.number,
                token=session.token,
                number=arena.number,
                slots=arena.slots,
                slot_bytes=arena.slot_bytes,
            )
        )

    def arena_over(self, path: str) -> None:
        """An arena is given up; its file goes next."""
        self._journal.remove(ArenaRecord, path=path)

    # --- plans and generations -----------------------------------------------------------------------------------

    def plan(self, plan: CurrentPlan, *, in_force: bool) -> None:
        """A plan was made, was committed under, or is in force no more."""
        self._journal.put(
            PlanRecord(
                path=plan.path,
                job=self.number,
                incarnation=plan.made_for[0],
                sequence=plan.made_for[1],
                digests=msgspec.msgpack.encode(plan.digests),
                image_bytes=msgspec.msgpack.encode(plan.image_bytes),
                in_force=in_force,
                committed=plan.committed,
            )
        )

    def plan_over(self, path: str) -> None:
        """Nobody needs a plan any more; its files go next."""
        self._journal.remove(PlanRecord, path=path)

    def sealed(self, generation: Generation, rank: int, seal: Seal) -> None:
        """A rank's slot is ours."""
        key = self._key(generation)
        message = messages.encode(seal.message)
        record = SealRecord(**key, rank=rank, message=message, arena_path=seal.arena.path)
        if generation.rules.error is not None:
            self._journal.put(record)  # late: that the save has failed must stay written
        else:
            self._journal.put(self._generation(generation, "open"), record)

    def wave(self, generation: Generation, rank: int, seal: Sealed | WaveSealed, arena: ArenaFile) -> None:
        """A wave of a rank's image is ours."""
        record = WaveRecord(
            **self._key(generation),
            rank=rank,
            begin=part_of(seal)[0],
            message=messages.encode(seal),
            arena_path=arena.path,
            written=False,
        )
        self._journal.put(self._generation(generation, "open"), record)

    def wave_written(self, generation: Generation, rank: int, begin: int) -> None:
        """A wave is in the file."""
        for record in self._journal.read(WaveRecord, **self._key(generation), rank=rank, begin=begin):
            self._journal.put(msgspec.structs.replace(record, written=True))

    def written(self, generation: Generation, rank: int) -> None:
        """A rank's image is durable."""
        done = messages.encode(generation.written[rank])
        self._journal.put(WrittenRecord(**self._key(generation), rank=rank, done=done))

    def committed(self, generation: Generation) -> None:
        """The checkpoint is published. Its seals are kept: the image may stay in memory."""
        key = self._key(generation)
        verdict = VerdictRecord(**key, save_id=generation.save_id, error=b"", metadata=generation.metadata)
        self._journal.change(
            self._generation(generation, "committed"),
            verdict,
            removed=[(WrittenRecord, {**key}), (WaveRecord, {**key})],
        )

    def failed(self, generation: Generation, error: ErrorReport) -> None:
        """The save has failed; what it has written is still to be removed."""
        key = self._key(generation)
        encoded = messages.encode(error)
        verdict = VerdictRecord(**key, save_id=generation.save_id, error=encoded, metadata=b"")
        self._journal.put(self._generation(generation, "failed", encoded), verdict)

    def over(self, generation: Generation) -> None:
        """Nothing of a generation is left but its verdict."""
        kinds: list[type[Record]] = [GenerationRecord, SealRecord, WaveRecord, WrittenRecord]
        key = self._key(generation)
        self._journal.change(removed=[(kind, {**key}) for kind in kinds])

    def forget_verdict(self, incarnation: int, sequence: int) -> None:
        """Nobody can ask for it any more."""
        self._journal.remove(VerdictRecord, job=self.number, incarnation=incarnation, sequence=sequence)

    def _key(self, generation: Generation) -> dict[str, int]:
        return {"job": self.number, "incarnation": generation.incarnation, "sequence": generation.sequence}

    def _generation(self, generation: Generation, state: str, error: bytes = b"") -> GenerationRecord:
        return GenerationRecord(
            **self._key(generation),
            save_id=generation.save_id,
            checkpoint_id=generation.rules.checkpoint_id,
            world_size=generation.rules.world_size,
            plan_path="" if generation.plan is None else generation.plan.path,
            begun_unix_s=generation.begun_unix_s,
            state=state,  # type: ignore[arg-type]  # one of the three that the callers above name
            error=error,
        )
