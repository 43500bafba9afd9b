"""Medians over the rounds: what each system and the machine reached, in seconds, GB/s and CPU-seconds per GB.

One GB is 10**9 bytes. Rates are of the tensors' bytes, whatever a file holds beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median

import msgspec

from benchmarks.samples import (
    AdoptionResult,
    LimitsResult,
    Pair,
    PlanningResult,
    RestoreSample,
    Result,
    SaveSample,
    SlowdownSample,
    SoakResult,
    SystemResult,
)


class SystemSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One way to save; None where a figure does not apply to it.

    Attributes:
        stall_s: Seconds for which a save holds the trainer, steady state.
        durable_s: Seconds from the call to `result()`, steady state.
        persist_gb_per_s: Bytes by the seconds from staged to durable.
        cpu_s_per_gb: CPU-seconds of all processes of the saver by GB.
        background_return_s: Seconds until `async_save` returns with staging in the background.
        slowed: Share of a matmul loop's speed that a save takes while it is persisted, by number of threads.
        lost_s: Seconds of training lost by a save: its stall, and what it slows the loop with default threads.
    """

    saves: int
    open_s: float
    first_stall_s: float
    first_durable_s: float
    stall_s: float
    durable_s: float
    persist_gb_per_s: float
    cpu_s_per_gb: float
    background_return_s: float | None
    peak_extra_gb: float
    peak_dirty_gb: float
    slowed: dict[int, float]
    lost_s: float
    cold_load_gb_per_s: float | None
    warm_load_gb_per_s: float | None


class Against(msgspec.Struct, frozen=True, kw_only=True):
    """Ours against a limit taken beside it: the median of the ratios of their seconds, and the limit's own seconds."""

    slower: float
    limit_s: float


class RestoreSummary(msgspec.Struct, frozen=True, kw_only=True):
    """Loads from memory, against a raw read of the disk; and verified loads against such that do not look at hashes."""

    against_disk: Against
    verified: Against
    verified_cold: Against


class LimitsSummary(msgspec.Struct, frozen=True, kw_only=True):
    """The machine."""

    memcpy_gb_per_s: float
    memcpy_cpu_s_per_gb: float
    write_gb_per_s: float
    write_cpu_s_per_gb: float
    read_gb_per_s: float
    slowed: dict[int, float]

    def memcpy_s(self, gigabytes: float) -> float:
        """Return the seconds of one memcpy of so many GB."""
        return gigabytes / self.memcpy_gb_per_s

    def durable_s(self, gigabytes: float) -> float:
        """Return the seconds of one memcpy and one raw write of so many GB."""
        return self.memcpy_s(gigabytes) + gigabytes / self.write_gb_per_s

    @property
    def cpu_s_per_gb(self) -> float:
        """CPU-seconds of one memcpy and one raw write of a GB."""
        return self.memcpy_cpu_s_per_gb + self.write_cpu_s_per_gb


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One run of the benchmark."""

    others_share: float
    gigabytes: float
    tensors: int
    systems: dict[str, SystemSummary]
    limits: LimitsSummary
    first_stall: Against
    stall: Against
    persist: Against
    cold_load: Against | None
    soak: SoakResult
    planning: PlanningResult
    restore: RestoreSummary | None
    adoption: AdoptionResult

    @property
    def growth_bytes(self) -> int:
        """By how much the resident memory of ckptd's processes grew over the small saves."""
        return self.soak.resident_bytes[-1] - self.soak.resident_bytes[0]


def summarize(results: Sequence[Result], *, others_share: float) -> Summary:
    """Return the medians of a run.

    Args:
        results: All its results: of every system, the limits and the soak.
        others_share: Share of the machine's CPU time that other processes took meanwhile.
    """
    by_system: dict[str, list[SystemResult]] = {}
    for result in results:
        if isinstance(result, SystemResult):
            by_system.setdefault(result.system, []).append(result)
    any_system = next(iter(by_system.values()))[0]
    pairs = [result.pairs for rounds in by_system.values() for result in rounds if result.pairs is not None]
    cold = [pair for found in pairs for pair in found.cold_load]
    [soak] = [result for result in results if isinstance(result, SoakResult)]
    [adoption] = [result for result in results if isinstance(result, AdoptionResult)]
    [planning] = [result for result in results if isinstance(result, PlanningResult)]
    return Summary(
        others_share=others_share,
        gigabytes=any_system.nbytes / 1e9,
        tensors=any_system.tensors,
        systems={name: _summarize_system(rounds) for name, rounds in by_system.items()},
        limits=_summarize_limits([result for result in results if isinstance(result, LimitsResult)]),
        first_stall=_against([pair for found in pairs for pair in found.first_stall]),
        stall=_against([pair for found in pairs for pair in found.stall]),
        persist=_against([pair for found in pairs for pair in found.persist]),
        cold_load=_against(cold) if cold else None,
        soak=soak,
        planning=planning,
        restore=_summarize_restores([r.restore for rs in by_system.values() for r in rs if r.restore is not None]),
        adoption=adoption,
    )


def _against(pairs: list[Pair]) -> Against:
    return Against(slower=median(pair.slower for pair in pairs), limit_s=median(pair.limit_s for pair in pairs))


def _summarize_restores(rounds: list[RestoreSample]) -> RestoreSummary | None:
    if not rounds:
        return None
    return RestoreSummary(
        against_disk=_against([pair for found in rounds for pair in found.against_disk]),
        verified=_against([pair for found in rounds for pair in found.verified]),
        verified_cold=_against([pair for found in rounds for pair in found.verified_cold]),
    )


def _summarize_system(rounds: list[SystemResult]) -> SystemSummary:
    gigabytes = rounds[0].nbytes / 1e9
    steady = [sample for result in rounds for sample in result.steady]
    background = [sample.stall_s for result in rounds for sample in result.background]
    stall_s = _median(steady, lambda sample: sample.stall_s)
    slowed, window_s = _slowdowns([sample for result in rounds for sample in result.slowdowns])
    return SystemSummary(
        saves=len(steady),
        open_s=median(result.open_s for result in rounds),
        first_stall_s=median(result.first.stall_s for result in rounds),
        first_durable_s=median(result.first.durable_s for result in rounds),
        stall_s=stall_s,
        durable_s=_median(steady, lambda sample: sample.durable_s),
        persist_gb_per_s=gigabytes / _median(steady, lambda sample: sample.persist_s),
        cpu_s_per_gb=_median(steady, lambda sample: sample.cpu_s) / gigabytes,
        background_return_s=median(background) if background else None,
        peak_extra_gb=max(result.peak_extra_bytes for result in rounds) / 1e9,
        peak_dirty_gb=max(result.peak_dirty_bytes for result in rounds) / 1e9,
        slowed=slowed,
        lost_s=stall_s + (slowed[max(slowed)] * window_s if slowed else 0.0),
        cold_load_gb_per_s=_rate(gigabytes, (s for result in rounds for s in result.cold_load_s)),
        warm_load_gb_per_s=_rate(gigabytes, (s for result in rounds for s in result.warm_load_s)),
    )


def _slowdowns(samples: list[SlowdownSample]) -> tuple[dict[int, float], float]:
    """Return the median slowdown by threads, and the median window in seconds with the most threads."""
    threads = sorted({sample.threads for sample in samples}, reverse=True)
    slowed = {n: median(sample.slowed for sample in samples if sample.threads == n) for n in threads}
    window_s = median([s.window_s for s in samples if s.threads == threads[0]]) if threads else 0.0
    return slowed, window_s


def _summarize_limits(rounds: list[LimitsResult]) -> LimitsSummary:
    gigabytes = rounds[0].nbytes / 1e9
    return LimitsSummary(
        memcpy_gb_per_s=gigabytes / median(s for result in rounds for s in result.memcpy_s),
        memcpy_cpu_s_per_gb=median(s for result in rounds for s in result.memcpy_cpu_s) / gigabytes,
        write_gb_per_s=gigabytes / median(s for result in rounds for s in result.write_s),
        write_cpu_s_per_gb=median(s for result in rounds for s in result.write_cpu_s) / gigabytes,
        read_gb_per_s=gigabytes / median(s for result in rounds for s in result.read_s),
        slowed=_slowdowns([sample for result in rounds for sample in result.slowdowns])[0],
    )


def _median(samples: Iterable[SaveSample], what: Callable[[SaveSample], float]) -> float:
    return median(what(sample) for sample in samples)


def _rate(gigabytes: float, seconds: Iterable[float]) -> float | None:
    found = list(seconds)
    return gigabytes / median(found) if found else None
