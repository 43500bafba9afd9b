"""What ckptd promises, held against one run. Tells; asserts nothing: a shared machine is no judge."""

from __future__ import annotations

from statistics import median
from typing import Final, Literal

import msgspec

from benchmarks.samples import FormatSample
from benchmarks.summary import Summary
from benchmarks.systems import WAVE_SLOT_BYTES, WAVE_SLOTS

_FLAT_BYTES: Final = 1 << 20  # CPython takes memory from the system in steps of 1 MiB: obmalloc.h, ARENA_SIZE
_RING_GB: Final = WAVE_SLOTS * WAVE_SLOT_BYTES / 1e9
_SLOWED_AT_MOST: Final = 0.05
_ADOPTED_WITHIN_S: Final = 1.0
_VERIFYING_AT_MOST: Final = 0.10
_LOCAL_PLAN_WITHIN_S: Final = 50e-3
_RETURNS_WITHIN_S: Final = 2e-3
_RETURNS_WITHIN_S_PER_TENSOR: Final = 5e-6


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """One promise.

    Attributes:
        what: What was measured.
        unit: Unit of ``ours``, ``stock`` and ``limit``.
        stock: Stock's figures: one, or those of its thread and process executors.
        limit: The machine's own figure, or the bound where the promise is a number. Beside a matmul loop: what the
            loop loses to the raw write alone.
        ratio_of: What is divided by what.
        relation: Whether the ratio must be at least or at most ``bound``.
    """

    number: int
    what: str
    unit: str
    ours: float
    stock: list[float]
    limit: float | None
    ratio_of: str
    ratio: float
    relation: Literal["≥", "≤"]
    bound: float

    @property
    def met(self) -> bool:
        """Whether it was kept in this run."""
        return self.ratio >= self.bound if self.relation == "≥" else self.ratio <= self.bound


def targets_of(run: Summary) -> list[Target]:
    """Return every promise with the figures of a run."""
    saving = [*_persisting(run), *_staging(run), *_steadiness(run), *_slowdowns(run)]
    return [*saving, *_loading(run), *_planning(run), *_waves(run), *_restoring(run)]


def _persisting(run: Summary) -> list[Target]:
    ours, process, limits = run.systems["ckptd"], run.systems["process"], run.limits
    return [
        Target(
            number=1,
            what="seconds to durable, steady state",
            unit="s",
            ours=ours.durable_s,
            stock=[process.durable_s],
            limit=limits.durable_s(run.gigabytes),
            ratio_of="torch process / ours",
            ratio=process.durable_s / ours.durable_s,
            relation="≥",
            bound=2.5,
        ),
        Target(
            number=1,
            what="persist rate",
            unit="GB/s",
            ours=ours.persist_gb_per_s,
            stock=[process.persist_gb_per_s],
            limit=run.gigabytes / run.persist.limit_s,
            ratio_of="ours / raw write, pairs",
            ratio=1 / run.persist.slower,
            relation="≥",
            bound=0.85,
        ),
        Target(
            number=2,
            what="CPU of all processes",
            unit="CPU-s/GB",
            ours=ours.cpu_s_per_gb,
            stock=[process.cpu_s_per_gb],
            limit=limits.cpu_s_per_gb,
            ratio_of="torch process / ours",
            ratio=process.cpu_s_per_gb / ours.cpu_s_per_gb,
            relation="≥",
            bound=8.0,
        ),
    ]


def _staging(run: Summary) -> list[Target]:
    ours, process = run.systems["ckptd"], run.systems["process"]
    targets = [
        Target(
            number=3,
            what="stall, staged in the call",
            unit="s",
            ours=ours.stall_s,
            stock=[process.stall_s],
            limit=run.stall.limit_s,
            ratio_of="ours / memcpy, pairs",
            ratio=run.stall.slower,
            relation="≤",
            bound=1.15,
        )
    ]
    if ours.background_return_s is not None:
        within_s = _RETURNS_WITHIN_S + _RETURNS_WITHIN_S_PER_TENSOR * run.tensors
        targets.append(
            Target(
                number=3,
                what="stall, staged in the background",
                unit="ms",
                ours=ours.background_return_s * 1e3,
                stock=[],
                limit=within_s * 1e3,
                ratio_of="ours / (2 ms + 5 us a tensor)",
                ratio=ours.background_return_s / within_s,
                relation="≤",
                bound=1.0,
            )
        )
    return targets


def _steadiness(run: Summary) -> list[Target]:
    ours, process = run.systems["ckptd"], run.systems["process"]
    first = [
        ("first save, seconds to durable", ours.first_durable_s, process.first_durable_s, ours.durable_s),
        ("first save, stall", ours.first_stall_s, process.first_stall_s, ours.stall_s),
    ]
    return [
        *(
            Target(
                number=4,
                what=what,
                unit="s",
                ours=ours_s,
                stock=[stock_s],
                limit=None,
                ratio_of="first / later",
                ratio=ours_s / later_s,
                relation="≤",
                bound=1.3,
            )
            for what, ours_s, stock_s, later_s in first
        ),
        Target(
            number=4,
            what="the same, each by a memcpy just before it",
            unit="memcpies",
            ours=run.first_stall.slower,
            stock=[],
            limit=None,
            ratio_of="first / later",
            ratio=run.first_stall.slower / run.stall.slower,
            relation="≤",
            bound=1.3,
        ),
        Target(
            number=4,
            what=f"resident memory, growth over {run.soak.saves[-1]} small saves",
            unit="bytes",
            ours=run.growth_bytes,
            stock=[],
            limit=_FLAT_BYTES,
            ratio_of="ours / 1 MiB",
            ratio=run.growth_bytes / _FLAT_BYTES,
            relation="≤",
            bound=1.0,
        ),
    ]


def _waves(run: Summary) -> list[Target]:
    waves = run.systems.get("waves")
    if waves is None or not waves.peak_extra_gb:
        return []
    return [
        Target(
            number=9,
            what="peak extra memory, staged in waves",
            unit="GB",
            ours=waves.peak_extra_gb,
            stock=[],
            limit=_RING_GB,
            ratio_of="ours / two slots of 64 MiB",
            ratio=waves.peak_extra_gb / _RING_GB,
            relation="≤",
            bound=2.0,  # the daemon and its worker are in it
        )
    ]


def _slowdowns(run: Summary) -> list[Target]:
    ours, stocks = run.systems["ckptd"], [run.systems["thread"], run.systems["process"]]
    return [
        Target(
            number=5,
            what=f"matmul loop slowed, {threads} {'thread' if threads == 1 else 'threads'}",
            unit="%",
            ours=slowed * 100,
            stock=[stock.slowed[threads] * 100 for stock in stocks if threads in stock.slowed],
            limit=run.limits.slowed[threads] * 100 if threads in run.limits.slowed else None,
            ratio_of="ours / 5 %",
            ratio=slowed / _SLOWED_AT_MOST,
            relation="≤",
            bound=1.0,
        )
        for threads, slowed in ours.slowed.items()
    ]


def _loading(run: Summary) -> list[Target]:
    ours, stock = run.systems["ckptd"], run.systems["sync"]
    targets = []
    if ours.cold_load_gb_per_s and stock.cold_load_gb_per_s and run.cold_load is not None:
        targets.append(
            Target(
                number=6,
                what="load, cold",
                unit="GB/s",
                ours=ours.cold_load_gb_per_s,
                stock=[stock.cold_load_gb_per_s],
                limit=run.gigabytes / run.cold_load.limit_s,
                ratio_of="ours / raw read, pairs",
                ratio=1 / run.cold_load.slower,
                relation="≥",
                bound=0.85,
            )
        )
    if ours.warm_load_gb_per_s and stock.warm_load_gb_per_s:
        targets.append(
            Target(
                number=6,
                what="load, warm",
                unit="GB/s",
                ours=ours.warm_load_gb_per_s,
                stock=[stock.warm_load_gb_per_s],
                limit=None,
                ratio_of="ours / torch",
                ratio=ours.warm_load_gb_per_s / stock.warm_load_gb_per_s,
                relation="≥",
                bound=1.5,
            )
        )
    return targets


def _restoring(run: Summary) -> list[Target]:
    adoption, restore = run.adoption, run.restore
    ready_s = median(adoption.ready_s)
    targets = [
        Target(
            number=10,
            what=f"a killed daemon's successor has taken up {adoption.generations} saves",
            unit="s",
            ours=ready_s,
            stock=[],
            limit=_ADOPTED_WITHIN_S,
            ratio_of="ours / 1 s",
            ratio=ready_s / _ADOPTED_WITHIN_S,
            relation="≤",
            bound=1.0,
        )
    ]
    if restore is None:
        return targets
    disk = restore.against_disk
    targets.append(
        Target(
            number=10,
            what="load from memory",
            unit="GB/s",
            ours=run.gigabytes / (disk.limit_s * disk.slower),
            stock=[],
            limit=run.gigabytes / disk.limit_s,
            ratio_of="ours / raw read of the disk, pairs",
            ratio=1 / disk.slower,
            relation="≥",
            bound=4.0,
        )
    )
    for where, pairs in (("from the disk", restore.verified_cold), ("from memory", restore.verified)):
        targets.append(
            Target(
                number=10,
                what=f"verifying while loading {where}",
                unit="%",
                ours=(pairs.slower - 1) * 100,
                stock=[],
                limit=_VERIFYING_AT_MOST * 100,
                ratio_of="with / without hashes, pairs",
                ratio=pairs.slower,
                relation="≤",
                bound=1 + _VERIFYING_AT_MOST,
            )
        )
    return targets


def _planning(run: Summary) -> list[Target]:
    planning, reshard = run.planning, run.planning.reshard
    local_s = median(planning.local_plan_s) + median(planning.layout_s)
    ours_s, stock_s = median(reshard.ours_s), median(reshard.stock_s)
    return [
        Target(
            number=6,
            what=f"load by {reshard.loaded_by} ranks of what {reshard.saved_by} saved, warm",
            unit="GB/s",
            ours=reshard.nbytes / reshard.loaded_by / 1e9 / ours_s,
            stock=[reshard.nbytes / reshard.loaded_by / 1e9 / stock_s],
            limit=None,
            ratio_of="ours / torch",
            ratio=stock_s / ours_s,
            relation="≥",
            bound=2.0,
        ),
        Target(
            number=7,
            what=f"local plan and layout, {planning.local_items:,} items",
            unit="ms",
            ours=local_s * 1e3,
            stock=[],
            limit=_LOCAL_PLAN_WITHIN_S * 1e3,
            ratio_of="ours / 50 ms",
            ratio=local_s / _LOCAL_PLAN_WITHIN_S,
            relation="≤",
            bound=1.0,
        ),
        *(target for sample in planning.formats for target in _metadata(sample)),
    ]


def _metadata(sample: FormatSample) -> list[Target]:
    figures = [
        ("our index written", median(sample.index_write_s), sample.stock_write_s, 20.0),
        ("our index read", median(sample.index_read_s), sample.stock_read_s, 20.0),
        (".metadata written", median(sample.metadata_write_s), sample.stock_write_s, 3.0),
        (".metadata read", median(sample.metadata_read_s), sample.stock_read_s, 1.0),
    ]
    return [
        Target(
            number=8,
            what=f"{what}, {sample.what}",
            unit="s",
            ours=ours_s,
            stock=[stock_s],
            limit=None,
            ratio_of="torch / ours",
            ratio=stock_s / ours_s,
            relation="≥",
            bound=bound,
        )
        for what, ours_s, stock_s, bound in figures
    ]
