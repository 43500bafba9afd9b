"""Every metric of the daemon, in a registry of its own.

Counters and histograms are told; gauges that mirror live state are asked for at each scrape, so that they
cannot drift. Invariant: every series of a closed label set exists, as 0, from the first scrape on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal, get_args

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
)
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from ckptd import __version__
from ckptd.protocol.errors import (
    BY_CODE,
    CapacityError,
    CkptdError,
    LifecycleError,
    PlanError,
    RankFailed,
    RequestError,
    StorageError,
)

Phase = Literal["plan", "stage", "queue", "write", "fsync", "commit"]
Outcome = Literal["committed", "failed", "skipped"]
Kind = Literal["request", "capacity", "storage", "plan", "lifecycle", "internal"]
Reason = Literal["garbage", "token", "protocol", "uid", "stale"]
SlotState = Literal["free", "staging", "sealed", "persisting"]
Memory = Literal["absent", "served", "overwritten", "damaged"]

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST

# Seconds. From a plan found in the cache to a terabyte on a slow network volume.
_BUCKETS_S: Final = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1),
    *(2, 5, 10, 20, 60, 120, 300, 600, 1800, 3600),
)

_KINDS: Final[tuple[tuple[type[CkptdError], Kind], ...]] = (
    (RequestError, "request"),
    (CapacityError, "capacity"),
    (StorageError, "storage"),
    (PlanError, "plan"),
    (LifecycleError, "lifecycle"),
)


@dataclass(frozen=True)
class Live:
    """What the daemon holds at this moment.

    Attributes:
        slots: Number of slots per :data:`SlotState`; a state may be missing and is then 0.
        queue_depth: Sealed images that wait for a worker.
        sessions: Open sessions.
        workers: Running worker processes.
        arena_bytes: Size of all arenas together, in bytes.
    """

    slots: Mapping[str, int]
    queue_depth: int
    sessions: int
    workers: int
    arena_bytes: int

    def __post_init__(self) -> None:
        """Refuse a state that no series would show: its slots would vanish from the sum."""
        if unknown := set(self.slots) - set(get_args(SlotState)):
            raise ValueError(f"not slot states: {sorted(unknown)}")


class Metrics:
    """The daemon's metrics; its methods are called where the thing happens."""

    def __init__(self, snapshot: Callable[[], Live], *, clock: Callable[[], float] = time.time) -> None:
        """Declare all metrics.

        Args:
            snapshot: Returns what is live; called once per scrape, in the scraping thread.
            clock: Returns Unix time in seconds.
        """
        # Process-wide: spares a second series, the time of its creation, beside each counter.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._gauges = _Gauges(snapshot, clock)
        self._registry.register(self._gauges)
        phase = self._histogram("ckptd_phase_seconds", "Time that one phase of a save took on one rank.", "phase")
        self._phases = {name: phase.labels(name) for name in get_args(Phase)}
        self._stall = self._histogram("ckptd_trainer_stall_seconds", "Time that a trainer waited in a save call.")
        self._save = self._histogram("ckptd_save_seconds", "Time from scheduling a save to its commit.")
        self._staged = self._counter("ckptd_staged_bytes", "Bytes that trainers copied into slots.")
        self._written = self._counter("ckptd_written_bytes", "Bytes that workers wrote, repeated work included.")
        self._committed = self._counter("ckptd_committed_bytes", "Bytes of published checkpoints.")
        self._restarts = self._counter("ckptd_worker_restarts", "Dead workers that were replaced.")
        self._cached = self._counter("ckptd_node_cache_served_bytes", "Bytes that loads took from another rank's read.")
        self._restored = self._counter(
            "ckptd_memory_served_bytes", "Bytes that loads took from a save still in memory."
        )
        restores = self._counter("ckptd_memory_loads", "Loads that asked for a save still in memory.", "memory")
        self._restores = {name: restores.labels(name) for name in get_args(Memory)}
        saves = self._counter("ckptd_saves", "Saves that came to an end, by outcome.", "outcome")
        self._saves = {name: saves.labels(name) for name in get_args(Outcome)}
        failures = self._counter("ckptd_failures", "Failed saves, by class of the root cause.", "kind")
        self._failures = {name: failures.labels(name) for name in get_args(Kind)}
        rejected = self._counter("ckptd_rejected_messages", "Messages dropped unanswered or refused.", "reason")
        self._rejected = {name: rejected.labels(name) for name in get_args(Reason)}

    def observe_phase(self, phase: Phase, seconds: float) -> None:
        """Record how long one phase of a save took on one rank, in seconds."""
        self._phases[phase].observe(seconds)

    def observe_stall(self, seconds: float) -> None:
        """Record how long a trainer waited in a save call, in seconds."""
        self._stall.observe(seconds)

    def staged(self, nbytes: int) -> None:
        """Count bytes that a trainer has copied into a slot."""
        self._staged.inc(nbytes)

    def written(self, nbytes: int) -> None:
        """Count bytes that a worker has written."""
        self._written.inc(nbytes)

    def served_from_cache(self, nbytes: int) -> None:
        """Count bytes that a rank was told to copy from the node cache instead of reading them."""
        self._cached.inc(nbytes)

    def loaded_from_memory(self, memory: Memory, nbytes: int) -> None:
        """Count a load that asked for a save in memory: none there, served, or read again from the disk.

        Args:
            memory: What it found there.
            nbytes: What it read from there, in bytes.
        """
        self._restores[memory].inc()
        if memory == "served":
            self._restored.inc(nbytes)

    def committed(self, nbytes: int, seconds: float, *, now: float) -> None:
        """Count a published checkpoint.

        Args:
            nbytes: Its size, in bytes.
            seconds: From the moment it was scheduled, in seconds.
            now: Unix time of the commit, in seconds.
        """
        self._saves["committed"].inc()
        self._committed.inc(nbytes)
        self._save.observe(seconds)
        self._gauges.last_commit_s = now

    def failed(self, error: CkptdError) -> None:
        """Count a save that failed, under the kind of its root cause."""
        self._saves["failed"].inc()
        self._failures[failure_kind(error)].inc()

    def skipped(self) -> None:
        """Count a save that was left out because no slot was free."""
        self._saves["skipped"].inc()

    def worker_restarted(self) -> None:
        """Count a dead worker that was replaced."""
        self._restarts.inc()

    def rejected(self, reason: Reason) -> None:
        """Count a message that was dropped or refused."""
        self._rejected[reason].inc()

    def render(self) -> bytes:
        """Return all metrics in the text format of :data:`CONTENT_TYPE`."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(name, text, labels, buckets=_BUCKETS_S, registry=self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self._registry)


def failure_kind(error: CkptdError) -> Kind:
    """Return the class of an error as a label; a rank's failure counts as what caused it."""
    kind: type[CkptdError] = type(error)
    if isinstance(error, RankFailed):
        kind = BY_CODE.get(error.cause_code, CkptdError)
    return next((label for base, label in _KINDS if issubclass(kind, base)), "internal")


class _Gauges(Collector):
    """Everything that is asked for at scrape time."""

    def __init__(self, snapshot: Callable[[], Live], clock: Callable[[], float]) -> None:
        self._snapshot = snapshot
        self._clock = clock
        self._start_s = clock()
        self.last_commit_s: float | None = None

    def collect(self) -> Iterator[Metric]:
        # Counts carry the counted noun as their unit: "_count" belongs to histograms, and promtool's
        # linter rejects it elsewhere.
        live = self._snapshot()
        slots = GaugeMetricFamily("ckptd_slots", "Slots of all arenas, by state.", labels=["state"])
        for state in get_args(SlotState):
            slots.add_metric([state], live.slots.get(state, 0))
        yield slots
        yield GaugeMetricFamily("ckptd_queued_images", "Sealed images that wait for a worker.", live.queue_depth)
        yield GaugeMetricFamily("ckptd_sessions", "Open sessions.", live.sessions)
        yield GaugeMetricFamily("ckptd_workers", "Running worker processes.", live.workers)
        yield GaugeMetricFamily("ckptd_arena_bytes", "Shared memory of all arenas.", live.arena_bytes)
        yield GaugeMetricFamily("ckptd_start_time_seconds", "Unix time of the daemon's start.", self._start_s)
        yield InfoMetricFamily("ckptd_build", "Version of the daemon.", {"version": __version__})
        yield from self._last_commit()

    def _last_commit(self) -> Iterator[Metric]:
        when = GaugeMetricFamily("ckptd_last_commit_timestamp_seconds", "Unix time of the last commit, if any.")
        age = GaugeMetricFamily("ckptd_last_commit_age_seconds", "Time since the last commit, if any.")
        if self.last_commit_s is not None:
            when.add_metric([], self.last_commit_s)
            age.add_metric([], max(0.0, self._clock() - self.last_commit_s))
        yield when
        yield age
