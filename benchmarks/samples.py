"""What the child processes measure, as they print it: one JSON message a line, numbers raw, nothing aggregated.

Invariant: every number that a table or a plot shows can be computed again from these messages.
"""

from __future__ import annotations

import msgspec


class Sample(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag=True):
    """A message of a child; the class's name stands in its ``type``."""


class SaveSample(Sample, frozen=True):
    """One save; seconds count from the call of `save` or `async_save`.

    Attributes:
        stall_s: Until the call returned to the trainer.
        staged_s: Until the tensors could change.
        announced_s: Until the future was done.
        durable_s: Until `result()` had returned in the trainer.
        cpu_s: CPU-seconds of the trainer, its descendants, and the daemon and its workers, from call to result.
    """

    stall_s: float
    staged_s: float
    announced_s: float
    durable_s: float
    cpu_s: float

    @property
    def persist_s(self) -> float:
        """Seconds from staged to durable; of a save that holds the trainer to its end, all of them."""
        return self.announced_s - self.staged_s if self.stall_s < self.announced_s else self.announced_s


class SlowdownSample(Sample, frozen=True):
    """A matmul loop in the trainer, beside a save and without one.

    Attributes:
        threads: torch's threads in the trainer.
        idle_per_s: Iterations per second just before and just after the save.
        during_per_s: Iterations per second between staged and durable.
        window_s: Seconds between staged and durable.
    """

    threads: int
    idle_per_s: float
    during_per_s: float
    window_s: float

    @property
    def slowed(self) -> float:
        """Share of the trainer's speed that the save took; noise can make it negative."""
        return 1 - self.during_per_s / self.idle_per_s


class SystemResult(Sample, frozen=True):
    """One round of one way to save.

    Attributes:
        system: Its name, one of :data:`benchmarks.systems.SYSTEMS`.
        nbytes: Bytes of all tensors of the state dict.
        tensors: Number of tensors.
        open_s: Seconds of what is done once ahead of the first save: `connect`, or a process group.
        first: The first save.
        steady: The saves after it.
        background: Saves staged in the background; only ckptd's.
        slowdowns: A matmul loop beside saves.
        peak_extra_bytes: Most memory above that of a trainer that does not save; see :mod:`benchmarks.measure`.
        peak_dirty_bytes: Most page cache of the machine that waited to be written, in the same save.
        cold_load_s: Seconds of each load with the files dropped from the page cache.
        warm_load_s: Seconds of each load with the files in the page cache.
    """

    system: str
    nbytes: int
    tensors: int
    open_s: float
    first: SaveSample
    steady: list[SaveSample]
    background: list[SaveSample]
    slowdowns: list[SlowdownSample]
    peak_extra_bytes: int
    peak_dirty_bytes: int
    cold_load_s: list[float]
    warm_load_s: list[float]


class LimitsResult(Sample, frozen=True):
    """What the machine can do with as many bytes: seconds of each repetition.

    ``slowdowns``: a matmul loop beside nothing but the raw write.
    """

    nbytes: int
    memcpy_s: list[float]
    write_s: list[float]
    write_cpu_s: list[float]
    read_s: list[float]
    slowdowns: list[SlowdownSample]


class SoakResult(Sample, frozen=True):
    """Many saves of a small model: resident bytes of trainer, daemon and workers after so many saves."""

    nbytes: int
    tensors: int
    saves: list[int]
    resident_bytes: list[int]


class Step(Sample, frozen=True):
    """What a child is about to do, for whoever watches."""

    what: str


Result = SystemResult | LimitsResult | SoakResult
Message = Result | Step
