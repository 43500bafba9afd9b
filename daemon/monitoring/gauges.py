"""The metrics that mirror live state: asked for at each scrape, so that they cannot drift."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from ckptd import __version__
from ckptd.daemon.monitoring.labels import Role, SlotState, Volume
from ckptd.daemon.monitoring.usage import Usage
from ckptd.daemon.monitoring.volumes import Room


@dataclass(frozen=True)
class Live:
    """What the daemon holds at this moment.

    Attributes:
        slots: Number of slots per :data:`SlotState`; a state may be missing and is then 0.
        queue_depth: Sealed images that wait for a worker.
        sessions: Open sessions.
        workers: Running worker processes.
        arena_bytes: Size of all arenas together, in bytes.
        saves: Saves that have begun and not ended.
        full_sessions: Sessions all of whose slots are taken.
        lateness: Age of the last commit in intervals, of the latest connected job; None where none has a rhythm yet.
        connections: Open HTTP connections.
        streams: Event streams among them.
        usage: What the processes of each role use.
        rooms: Room on the volumes in use, as of the last look.
        memory: Size of the node's memory, and how much of it is available, in bytes; None where nobody looked.
    """

    slots: Mapping[str, int]
    queue_depth: int
    sessions: int
    workers: int
    arena_bytes: int
    saves: int = 0
    full_sessions: int = 0
    lateness: float | None = None
    connections: int = 0
    streams: int = 0
    usage: Mapping[Role, Usage] = field(default_factory=dict)
    rooms: Mapping[Volume, Room] = field(default_factory=dict)
    memory: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Refuse a state that no series would show: its slots would vanish from the sum."""
        if unknown := set(self.slots) - set(get_args(SlotState)):
            raise ValueError(f"not slot states: {sorted(unknown)}")


class Gauges(Collector):
    """Everything that is asked for at scrape time.

    Attributes:
        last_commit_s: Unix time of the last commit, in seconds; None before the first, and then no series tells it.
        last_commit_bytes: Size of that checkpoint, in bytes.
        write_rate: Rate at which it was written, in bytes per second.
        peak_rate: The highest rate of any image or save so far: what the disk has been seen to take.
    """

    def __init__(self, snapshot: Callable[[], Live], clock: Callable[[], float]) -> None:
        self._snapshot = snapshot
        self._clock = clock
        self._start_s = clock()
        self.last_commit_s: float | None = None
        self.last_commit_bytes = 0
        self.write_rate: float | None = None
        self.peak_rate: float | None = None

    def collect(self) -> Iterator[Metric]:
        """Yield all gauges. Called once per scrape."""
        # Counts carry the counted noun as their unit: "_count" belongs to histograms, and promtool's
        # linter rejects it elsewhere.
        live = self._snapshot()
        yield from _of_slots(live)
        yield from _of_work(live)
        yield from _of_processes(live)
        yield from _of_room(live)
        yield _gauge("ckptd_start_time_seconds", "Unix time of the daemon's start.", self._start_s)
        yield InfoMetricFamily("ckptd_build", "Version of the daemon.", {"version": __version__})
        yield from self._last_commit()
        yield _gauge("ckptd_commit_lateness_ratio", _LATENESS, live.lateness)

    def _last_commit(self) -> Iterator[Metric]:
        when, nbytes, age = self.last_commit_s, None, None
        if when is not None:
            nbytes, age = self.last_commit_bytes, max(0.0, self._clock() - when)
        yield _gauge("ckptd_last_commit_timestamp_seconds", "Unix time of the last commit, if any.", when)
        yield _gauge("ckptd_last_commit_age_seconds", "Time since the last commit, if any.", age)
        yield _gauge("ckptd_last_commit_bytes", "Size of the last published checkpoint, if any.", nbytes)
        yield _gauge(
            "ckptd_write_bytes_per_second", "Rate at which the last save was written, if any.", self.write_rate
        )
        yield _gauge("ckptd_write_peak_bytes_per_second", _PEAK, self.peak_rate)


_LATENESS = "Age of the last commit in intervals between commits, of the latest connected job; none before two commits."
_PEAK = "Highest rate at which an image or a save was written, fsync included: the disk's measured limit, if any."


def _of_slots(live: Live) -> Iterator[Metric]:
    slots = GaugeMetricFamily("ckptd_slots", "Slots of all arenas, by state.", labels=["state"])
    for state in get_args(SlotState):
        slots.add_metric([state], live.slots.get(state, 0))
    yield slots
    yield _gauge("ckptd_full_sessions", "Sessions all of whose slots are taken.", live.full_sessions)
    yield _gauge("ckptd_arena_bytes", "Shared memory of all arenas.", live.arena_bytes)


def _of_work(live: Live) -> Iterator[Metric]:
    yield _gauge("ckptd_queued_images", "Sealed images that wait for a worker.", live.queue_depth)
    yield _gauge("ckptd_sessions", "Open sessions.", live.sessions)
    yield _gauge("ckptd_workers", "Running worker processes.", live.workers)
    yield _gauge("ckptd_saves_in_progress", "Saves that have begun and not ended.", live.saves)
    yield _gauge("ckptd_http_connections", "Open HTTP connections.", live.connections)
    yield _gauge("ckptd_http_streams", "Event streams among the HTTP connections.", live.streams)


def _of_processes(live: Live) -> Iterator[Metric]:
    cpu = CounterMetricFamily("ckptd_cpu_seconds", "Processor time of the processes of a role.", labels=["role"])
    resident = GaugeMetricFamily(
        "ckptd_resident_bytes", "Resident memory, by role; the arenas are in the shared part.", labels=["role", "kind"]
    )
    descriptors = GaugeMetricFamily("ckptd_open_descriptors", "Open file descriptors, by role.", labels=["role"])
    for role in get_args(Role):
        usage = live.usage.get(role, Usage())
        cpu.add_metric([role], usage.cpu_s)
        resident.add_metric([role, "private"], usage.private_bytes)
        resident.add_metric([role, "shared"], usage.shared_bytes)
        descriptors.add_metric([role], usage.descriptors)
    yield from (cpu, resident, descriptors)


def _of_room(live: Live) -> Iterator[Metric]:
    size = GaugeMetricFamily("ckptd_volume_size_bytes", "Size of the fullest volume in use.", labels=["volume"])
    free = GaugeMetricFamily("ckptd_volume_free_bytes", "Room on the fullest volume in use.", labels=["volume"])
    age = GaugeMetricFamily(
        "ckptd_volume_look_age_seconds", "Age of the two above; it grows while the volume hangs.", labels=["volume"]
    )
    for name, room in live.rooms.items():
        size.add_metric([name], room.size_bytes)
        free.add_metric([name], room.free_bytes)
        age.add_metric([name], room.age_s)
    yield from (size, free, age)
    total, available = live.memory or (None, None)
    yield _gauge("ckptd_node_memory_size_bytes", "Memory of the node.", total)
    yield _gauge("ckptd_node_memory_available_bytes", "Memory of the node that can be had without swapping.", available)


def _gauge(name: str, text: str, value: float | None) -> Metric:
    """Return a gauge of one series, or of none where there is no value: nothing is not 0."""
    family = GaugeMetricFamily(name, text)
    if value is not None:
        family.add_metric([], value)
    return family
