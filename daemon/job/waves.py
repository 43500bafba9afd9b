"""Images that come in waves: has each wave written while the next one is staged, and gives its slot back.

What a worker dies of is done again: a slot is freed only when its wave is in the file, where no process can lose it.
What a trainer has not staged to the end is abandoned with its save. A successor of this daemon knows from the journal
which waves are in the file, and goes on behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Protocol, cast

from ckptd.checkpoint.names import image_name
from ckptd.daemon.job.generation import Generation, RankWaves
from ckptd.daemon.recovery.job_log import JobLog
from ckptd.daemon.session.sessions import ArenaFile, Session
from ckptd.daemon.settings.config import Config
from ckptd.daemon.workers.supervisor import WorkerPool
from ckptd.daemon.workers.tasks import plan_of
from ckptd.protocol.errors import CkptdError, UnexpectedError, WriteIncomplete
from ckptd.protocol.messages import (
    DaemonMessage,
    Sealed,
    SlotFreed,
)
from ckptd.protocol.wave_messages import FinishWavesTask, WaveSealed, WaveWritten, WriteWaveTask
from ckptd.protocol.waves import Action, AllWritten, FreeSlot, Wave, WaveRing, WriteWave, part_of
from ckptd.staging.arena import SlotState, slot_offset


class Crew(Protocol):
    """Whose ranks stage."""

    log: JobLog
    sessions: dict[int, Session]
    pool: WorkerPool | None


@dataclass(frozen=True)
class SaveHooks:
    """What a job's saves do for their waves.

    Attributes:
        begin: Run work for a generation, which ends with it.
        fail: A rank's part of a generation cannot be made durable.
        progress: So many bytes of a rank's image are written.
        pool: Return the workers. Raises ShuttingDown.
        send: Send to a session.
    """

    begin: Callable[[Generation, Coroutine[object, object, None]], None]
    fail: Callable[[Generation, int, CkptdError], None]
    progress: Callable[[Generation, int, int], None]
    pool: Callable[[], WorkerPool]
    send: Callable[[Session, DaemonMessage], None]


def wave_of(seal: Sealed | WaveSealed) -> Wave:
    """Return the wave that a seal tells of."""
    begin, nbytes = part_of(seal)
    return Wave(begin, nbytes, seal.slot, seal.control_bytes)


class Waves:
    """The waves of one job's saves.

    Args:
        crew: The job.
        config: How workers write.
        hooks: What the saves do for us.
    """

    def __init__(self, crew: Crew, config: Config, hooks: SaveHooks) -> None:
        self._crew, self._config, self._hooks = crew, config, hooks

    def take(self, generation: Generation, rank: int, seal: Sealed | WaveSealed, arena: ArenaFile) -> None:
        """Have a sealed wave written. Raises BadMessage if it is no part of its image, or overlaps another one."""
        if generation.rules.decided:  # it failed, and is being cleaned up: nothing is written any more
            self._free(rank, arena, seal.slot)
            return
        mine = generation.waves.get(rank)
        if mine is None:
            mine = generation.waves[rank] = RankWaves(WaveRing(seal.image_bytes), arena)
        wave = wave_of(seal)
        known = mine.ring.has_heard_of(wave)
        actions = mine.ring.staged(wave)
        if not known:
            self._crew.log.wave(generation, rank, seal, arena)
        self._perform(generation, rank, actions)

    def go_on(self, generation: Generation, rank: int) -> None:
        """Go on with the waves that a daemon before us has taken: those that are in the file are not written again."""
        mine = generation.waves[rank]
        for wave, written in sorted(mine.left, key=lambda left: (not left[1], left[0].begin)):
            actions = mine.ring.staged(wave)
            if written:  # its slot is the client's again, and may hold another wave
                actions = [action for action in mine.ring.written(wave.begin) if not isinstance(action, FreeSlot)]
            self._perform(generation, rank, actions)
        mine.left.clear()

    def _perform(self, generation: Generation, rank: int, actions: list[Action]) -> None:
        mine = generation.waves[rank]
        for action in actions:
            match action:
                case WriteWave():
                    mine.arena.set_state(action.wave.slot, SlotState.PERSISTING, generation.sequence)
                    self._hooks.begin(generation, self._write(generation, rank, action))
                case FreeSlot():
                    self._free(rank, mine.arena, action.slot)
                case AllWritten():
                    mine.all_written.set()

    async def _write(self, generation: Generation, rank: int, action: WriteWave) -> None:
        mine, wave = generation.waves[rank], action.wave
        task = WriteWaveTask(
            arena_path=mine.arena.path,
            wave_offset=slot_offset(wave.slot, mine.arena.slot_bytes) + wave.control_bytes,
            nbytes=wave.nbytes,
            directory=generation.directory,
            file=image_name(rank),
            begin=wave.begin,
            image_bytes=mine.ring.image_bytes,
            first=action.first,
            threads=self._config.write_threads,
            chunk_bytes=self._config.write_chunk_bytes,
        )
        try:
            done = cast(
                WaveWritten,
                await self._hooks.pool().run(
                    task,
                    on_progress=lambda nbytes: self._hooks.progress(generation, rank, mine.ring.written_bytes + nbytes),
                ),
            )
        except CkptdError as error:
            self._hooks.fail(generation, rank, error)
            return
        mine.write_s += done.write_s
        mine.direct = mine.direct and done.direct
        self._crew.log.wave_written(generation, rank, wave.begin)
        self._perform(generation, rank, mine.ring.written(wave.begin))
        self._hooks.progress(generation, rank, mine.ring.written_bytes)

    async def finish(self, generation: Generation, rank: int) -> FinishWavesTask:
        """Wait until a sealed image is in its file, and return what makes it durable.

        Raises:
            WriteIncomplete: The last wave is there, but not all before it; nobody will bring them.
        """
        message, mine = generation.seals[rank].message, generation.waves.get(rank)
        if mine is None:
            raise UnexpectedError("the end of an image of which no wave was heard")
        if mine.ring.staged_bytes != mine.ring.image_bytes:
            raise WriteIncomplete(rank, mine.ring.image_bytes, mine.ring.staged_bytes)
        await mine.all_written.wait()  # the deadline is that of the save: each wave is news, and silence ends it
        return FinishWavesTask(
            plan_path=plan_of(generation).path,
            rank=rank,
            object_bytes=message.object_bytes,
            directory=generation.directory,
            file=image_name(rank),
            image_bytes=message.image_bytes,
            hashes=message.hashes,
            frame_hash=message.frame_hash,
            write_s=mine.write_s,
            direct=mine.direct,
        )

    def release(self, generation: Generation) -> None:
        """The generation has ended: give back the slots of waves that were not written."""
        for rank, mine in generation.waves.items():
            for slot in mine.ring.held_slots:
                self._free(rank, mine.arena, slot)

    def _free(self, rank: int, arena: ArenaFile, slot: int) -> None:
        arena.set_state(slot, SlotState.FREE)
        session = self._crew.sessions.get(rank)
        if session is not None and arena.number in session.arenas:
            self._hooks.send(session, SlotFreed(arena.number, slot))
