"""What of the daemon's state the metrics and the page show, gathered when somebody asks."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Final, Protocol, get_args

import psutil

from ckptd.daemon.job.jobs import Job
from ckptd.daemon.monitoring.gauges import Live
from ckptd.daemon.monitoring.labels import SlotState as SlotLabel
from ckptd.daemon.monitoring.labels import Volume
from ckptd.daemon.monitoring.usage import UsageMeter
from ckptd.daemon.monitoring.volumes import Room, VolumeWatch
from ckptd.daemon.session.sessions import Session
from ckptd.staging.arena import SlotState

# A slot that keeps a committed image is free for whoever wants to stage.
_SLOT_NAMES: Final = {state: state.name.lower() for state in SlotState} | {SlotState.RETAINED: "free"}


class Traffic(Protocol):
    """How busy the HTTP endpoint is."""

    @property
    def connections(self) -> int:
        """Open connections."""
        ...

    @property
    def streams(self) -> int:
        """Event streams among them."""
        ...


class Observer:
    """Gathers :class:`Live`.

    Args:
        volumes: Looks at the room on volumes.
    """

    def __init__(self, volumes: VolumeWatch) -> None:
        self._volumes = volumes
        self._meter = UsageMeter()

    def observe(self, jobs: Collection[Job], sessions: Collection[Session], traffic: Traffic | None) -> Live:
        """Return what is live now. Reads slots' states and ``/proc``; touches no file system."""
        slots = Counter(dict.fromkeys(get_args(SlotLabel), 0))
        full, arena_bytes = 0, 0
        for session in sessions:
            states = [_SLOT_NAMES[state] for arena in session.arenas.values() for state, _ in arena.states()]
            slots.update(states)
            full += bool(states) and "free" not in states
            arena_bytes += sum(arena.slots * arena.slot_bytes for arena in session.arenas.values())
        pools = [job.pool for job in jobs if job.pool is not None]
        memory = psutil.virtual_memory()
        pids = [pid for job in jobs for pid in job.worker_pids]
        return Live(
            slots=dict(slots),
            queue_depth=sum(pool.depth for pool in pools),
            sessions=len(sessions),
            workers=sum(len(pool.pids) for pool in pools),
            arena_bytes=arena_bytes,
            saves=sum(not generation.dry for job in jobs for generation in job.saves.generations.values()),
            full_sessions=full,
            lateness=_lateness(jobs),
            connections=0 if traffic is None else traffic.connections,
            streams=0 if traffic is None else traffic.streams,
            usage=self._meter.read(pids),
            rooms=self.rooms(jobs),
            memory=(memory.total, memory.available),
        )

    def rooms(self, jobs: Collection[Job]) -> Mapping[Volume, Room]:
        """Return the last look at the volumes that these jobs use; what is new is looked at soon."""
        for directory in _directories(jobs):
            self._volumes.used(directory)
        return self._volumes.rooms()


def _directories(jobs: Collection[Job]) -> set[str]:
    """Return where checkpoints are being written; an object store's id is no path."""
    ids = {g.rules.checkpoint_id for job in jobs for g in job.saves.generations.values()}
    ids |= {str(save["checkpoint_id"]) for job in jobs for save in job.saves.outcomes.history}
    return {os.path.dirname(path) for path in ids if path.startswith("/")}


def _lateness(jobs: Collection[Job]) -> float | None:
    """Return that of the latest job; one whose ranks have left is not late but over."""
    now = time.monotonic()
    found = [late for job in jobs if job.sessions and (late := job.saves.watch.rhythm.lateness(now)) is not None]
    return max(found, default=None)


def room_status(rooms: Mapping[Volume, Room]) -> dict[str, object]:
    """Return what `/status` tells of the volumes in use."""
    return {
        name: {"size_bytes": room.size_bytes, "free_bytes": room.free_bytes, "age_s": room.age_s}
        for name, room in rooms.items()
    }
