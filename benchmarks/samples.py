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


class Pair(Sample, frozen=True):
    """A figure of ours, and the machine's own, taken just before it: both in seconds."""

    ours_s: float
    limit_s: float

    @property
    def slower(self) -> float:
        """How many times the limit's seconds ours took."""
        return self.ours_s / self.limit_s


class Pairs(Sample, frozen=True):
    """Figures of ckptd beside the machine's own.

    Attributes:
        first_stall: The first `async_save` after `connect`, and a memcpy of the same tensors into shared memory.
        stall: The later ones, staged in the call, and a memcpy of the same tensors into shared memory.
        persist: Staged to durable, and a raw O_DIRECT write of as many bytes.
        cold_load: A load from the disk, and a raw O_DIRECT read of the same files.
    """

    first_stall: list[Pair]
    stall: list[Pair]
    persist: list[Pair]
    cold_load: list[Pair]


class RestoreSample(Sample, frozen=True):
    """Loads of ckptd's last save, by a process whose session has ended, while the daemon still holds it in memory.

    Attributes:
        against_disk: A load from memory, and a raw O_DIRECT read of the same files just before it.
        verified: A load from memory that holds every item against its hash, and one beside it that does not.
        verified_cold: The same from the disk, the files dropped from the page cache.
    """

    against_disk: list[Pair]
    verified: list[Pair]
    verified_cold: list[Pair]


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
        pairs: The machine's limits, taken between the saves and loads; only ckptd's.
        restore: Loads from memory; only ckptd's.
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
    pairs: Pairs | None = None
    restore: RestoreSample | None = None


class LimitsResult(Sample, frozen=True):
    """What the machine can do with as many bytes: seconds of each repetition.

    ``slowdowns``: a matmul loop beside nothing but the raw write.
    """

    nbytes: int
    memcpy_s: list[float]
    memcpy_cpu_s: list[float]
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


class AdoptionResult(Sample, frozen=True):
    """A daemon that is started after one that was killed with sealed saves, seconds from its exec.

    Attributes:
        generations: Saves that it has to take up.
        ready_s: Until it had taken them all up and served.
        finished_s: Until the trainer had heard that all of them are committed.
    """

    generations: int
    ready_s: list[float]
    finished_s: list[float]


class FormatSample(Sample, frozen=True):
    """What writing and reading the metadata of one checkpoint takes, in seconds, files in the page cache.

    Attributes:
        what: Its shape, for people.
        items: Chunks of tensors in it.
        index_write_s: Our index, from columns to a file.
        index_read_s: Our index, from a file to checked columns.
        metadata_write_s: Stock's `.metadata`, written by us.
        metadata_read_s: Stock's `.metadata`, written by stock, read by us to checked columns.
        stock_write_s: `pickle.dump` of torch's own objects, as stock does it.
        stock_read_s: `pickle.load` of that file, as stock does it.
        peak_bytes: Most memory above that before it: of each of the four that are ours, in this order.
    """

    what: str
    items: int
    index_write_s: list[float]
    index_read_s: list[float]
    metadata_write_s: list[float]
    metadata_read_s: list[float]
    stock_write_s: float
    stock_read_s: float
    peak_bytes: list[int]


class ReshardSample(Sample, frozen=True):
    """Loads of one rank's columns from a checkpoint that other ranks have saved by rows; files in the page cache."""

    nbytes: int
    tensors: int
    saved_by: int
    loaded_by: int
    ours_s: list[float]
    stock_s: list[float]


class PlanningResult(Sample, frozen=True):
    """Planning and metadata.

    Attributes:
        local_items: Items of one rank's plan.
        local_plan_s: From a look at the state dict to the encoded plan and its digest.
        layout_s: From the daemon's answer to the places of all items in the image.
        ranks: Ranks of the global plan.
        tensors: Tensors of which each of them holds a part.
        global_plan_s: From all ranks' encoded plans to the plan of the job.
    """

    local_items: int
    local_plan_s: list[float]
    layout_s: list[float]
    ranks: int
    tensors: int
    global_plan_s: list[float]
    formats: list[FormatSample]
    reshard: ReshardSample


class Step(Sample, frozen=True):
    """What a child is about to do, for whoever watches."""

    what: str


Result = SystemResult | LimitsResult | SoakResult | AdoptionResult | PlanningResult
Message = Result | Step
