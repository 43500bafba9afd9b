"""Every metric of the daemon, in a registry of its own.

Counters and histograms are told, here; gauges that mirror live state are in :mod:`ckptd.daemon.monitoring.gauges`.
Invariant: every series of a closed label set exists, as 0, from the first scrape on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, get_args

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
)
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST as OPENMETRICS_CONTENT_TYPE
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics

from ckptd.daemon.monitoring.gauges import Gauges, Live
from ckptd.daemon.monitoring.labels import Kind, Memory, Outcome, Phase, Reason, Refusal, failure_kind
from ckptd.protocol.errors import CkptdError

__all__ = ["CONTENT_TYPE", "OPEN_CONTENT_TYPE", "Live", "Metrics", "Reason"]

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
OPEN_CONTENT_TYPE: Final = OPENMETRICS_CONTENT_TYPE

# Seconds. From a plan found in the cache to a terabyte on a slow network volume.
_BUCKETS_S: Final = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1),
    *(2, 5, 10, 20, 60, 120, 300, 600, 1800, 3600),
)
# An exemplar's labels have 128 characters at most, names included. Source: OpenMetrics 1.0, "Exemplars".
_EXEMPLAR_CHARACTERS: Final = 120


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
        self._gauges = Gauges(snapshot, clock)
        self._registry.register(self._gauges)
        phase = self._histogram("ckptd_phase_seconds", "Time that one phase of a save took on one rank.", "phase")
        self._phases = {name: phase.labels(name) for name in get_args(Phase)}
        self._stall = self._histogram("ckptd_trainer_stall_seconds", "Time that a trainer waited in a save call.")
        self._save = self._histogram("ckptd_save_seconds", "Time from scheduling a save to its commit.")
        self._interval = self._histogram("ckptd_save_interval_seconds", "Time from one commit of a job to its next.")
        self._slowest = self._histogram(
            "ckptd_slowest_rank_seconds", "Time by which the last rank of a save sealed after the first."
        )
        self._staged = self._counter("ckptd_staged_bytes", "Bytes that trainers copied into slots.")
        self._written = self._counter("ckptd_written_bytes", "Bytes that workers wrote, repeated work included.")
        self._committed = self._counter("ckptd_committed_bytes", "Bytes of published checkpoints.")
        self._restarts = self._counter("ckptd_worker_restarts", "Dead workers that were replaced.")
        self._retries = self._counter("ckptd_work_retries", "Tasks of dead workers that were begun anew.")
        self._cached = self._counter("ckptd_node_cache_served_bytes", "Bytes that loads took from another rank's read.")
        self._restored = self._counter(
            "ckptd_memory_served_bytes", "Bytes that loads took from a save still in memory."
        )
        restores = self._counter("ckptd_memory_loads", "Loads that asked for a save still in memory.", "memory")
        self._restores = {name: restores.labels(name) for name in get_args(Memory)}
        self._removed = self._counter("ckptd_removed_checkpoints", "Checkpoints that retention removed.")
        self._write_retries = self._counter("ckptd_write_retries", "Images written again after a transient error.")
        saves = self._counter("ckptd_saves", "Saves that came to an end, by outcome.", "outcome")
        self._saves = {name: saves.labels(name) for name in get_args(Outcome)}
        failures = self._counter("ckptd_failures", "Failed saves, by class of the root cause.", "kind")
        self._failures = {name: failures.labels(name) for name in get_args(Kind)}
        rejected = self._counter("ckptd_rejected_messages", "Messages dropped unanswered or refused.", "reason")
        self._rejected = {name: rejected.labels(name) for name in get_args(Reason)}
        refused = self._counter("ckptd_refused_http_requests", "HTTP requests and connections refused.", "reason")
        self._refused = {name: refused.labels(name) for name in get_args(Refusal)}

    def observe_phase(self, phase: Phase, seconds: float, *, save_id: str = "") -> None:
        """Record how long one phase of a save took on one rank, in seconds; ``save_id`` becomes its exemplar."""
        self._phases[phase].observe(seconds, _exemplar(save_id))

    def observe_stall(self, seconds: float) -> None:
        """Record how long a trainer waited in a save call, in seconds."""
        self._stall.observe(seconds)

    def observe_interval(self, seconds: float) -> None:
        """Record the time between two commits of a job, in seconds."""
        self._interval.observe(seconds)

    def observe_slowest_rank(self, seconds: float, *, save_id: str = "") -> None:
        """Record by how many seconds the last rank of a save sealed after the first."""
        self._slowest.observe(seconds, _exemplar(save_id))

    def staged(self, nbytes: int) -> None:
        """Count bytes that a trainer has copied into a slot."""
        self._staged.inc(nbytes)

    def written(self, nbytes: int, seconds: float = 0.0) -> None:
        """Count bytes that a worker has written, in ``seconds`` with their fsync, or 0 where nobody measured."""
        self._written.inc(nbytes)
        if seconds > 0:
            self._raise_peak(nbytes / seconds)

    def save_written(self, rate: float) -> None:
        """Note how fast the images of a save were written together, in bytes per second."""
        self._gauges.write_rate = rate
        self._raise_peak(rate)

    def _raise_peak(self, rate: float) -> None:
        self._gauges.peak_rate = max(rate, self._gauges.peak_rate or 0.0)

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

    def committed(self, nbytes: int, seconds: float, *, now: float, save_id: str = "") -> None:
        """Count a published checkpoint.

        Args:
            nbytes: Its size, in bytes.
            seconds: From the moment it was scheduled, in seconds.
            now: Unix time of the commit, in seconds.
            save_id: Names the save in `/status` and in the exemplar of its duration.
        """
        self._saves["committed"].inc()
        self._committed.inc(nbytes)
        self._save.observe(seconds, _exemplar(save_id))
        self._gauges.last_commit_s, self._gauges.last_commit_bytes = now, nbytes

    @property
    def last_commit_s(self) -> float | None:
        """Unix time of the last commit, in seconds; None before the first."""
        return self._gauges.last_commit_s

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

    def removed(self, count: int) -> None:
        """Count checkpoints that retention has removed."""
        self._removed.inc(count)

    def write_retried(self) -> None:
        """Count an image that is written again after a transient error."""
        self._write_retries.inc()

    def work_retried(self) -> None:
        """Count a task that is begun anew after its worker's death."""
        self._retries.inc()

    def rejected(self, reason: Reason) -> None:
        """Count a message that was dropped or refused."""
        self._rejected[reason].inc()

    def refused(self, reason: Refusal) -> None:
        """Count an HTTP request or connection that was refused or cut."""
        self._refused[reason].inc()

    def render(self) -> bytes:
        """Return all metrics in the text format of :data:`CONTENT_TYPE`."""
        return generate_latest(self._registry)

    def render_open(self) -> bytes:
        """Return all metrics in the format of :data:`OPEN_CONTENT_TYPE`.

        It has exemplars, which name the save behind a slow observation; the plain text has none.
        """
        return generate_openmetrics(self._registry)  # type: ignore[no-any-return, no-untyped-call, unused-ignore]

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(name, text, labels, buckets=_BUCKETS_S, registry=self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self._registry)


def _exemplar(save_id: str) -> dict[str, str] | None:
    """Return the exemplar's labels; None without a name that fits and that every parser takes."""
    if not save_id or len(save_id) > _EXEMPLAR_CHARACTERS or not save_id.isascii():
        return None
    return {"save_id": save_id}
