"""What is done with one way to save, in a process of its own: saves, loads, a matmul loop, many small saves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Final

from benchmarks import measure
from benchmarks.limits import PairedLimits
from benchmarks.matmul import slowdown_beside, thread_counts
from benchmarks.restore import measure_cold, measure_memory
from benchmarks.samples import Pair, Pairs, RestoreSample, SaveSample, SlowdownSample, SoakResult, SystemResult
from benchmarks.systems import Ckptd, Pending, System
from benchmarks.workload import StateDict, bytes_of, clear, digest_of, make_state_dict, tensors_of

_SOAK_WARM_UP_SAVES: Final = 20
_SOAK_STEP_SAVES: Final = 20


@dataclass(frozen=True, kw_only=True)
class Scope:
    """How much is measured.

    Attributes:
        nbytes: Wanted bytes of the state dict.
        tensors: Wanted number of tensors.
        saves: Saves in steady state.
        slowdowns: Saves beside a matmul loop, for each number of threads.
        loads: Loads, cold and warm each.
        memory: Whether memory is sampled, in a save of its own.
    """

    nbytes: int
    tensors: int
    saves: int
    slowdowns: int
    loads: int
    memory: bool


class Trial:
    """One system under test, and the checkpoints it writes.

    Args:
        name: The system's name.
        system: The system.
        directory: Where its checkpoints go.
        tell: Called with what comes next.
    """

    def __init__(self, name: str, system: System, directory: Path, tell: Callable[[str], None]) -> None:
        self._name, self._system, self._directory, self._tell = name, system, directory, tell
        self._numbers = count()
        self._limits: PairedLimits | None = None
        self._pairs = Pairs(first_stall=[], stall=[], persist=[], cold_load=[])

    def run(self, scope: Scope) -> SystemResult:
        """Measure everything that applies to the system."""
        self._tell("making the state dict")
        state = make_state_dict(scope.nbytes, scope.tensors)
        if isinstance(self._system, Ckptd) and self._system.is_plain:
            self._limits = PairedLimits(tensors_of(state), self._directory)
        without = measure.memory_bytes(measure.family())
        restore = RestoreSample(against_disk=[], verified=[], verified_cold=[])
        try:
            self._tell("opening")
            begun = time.perf_counter()
            self._system.open(state)
            open_s = time.perf_counter() - begun
            first_limit_s = None if self._limits is None else self._limits.memcpy_s()
            [first] = self._saves(state, 1, "first save")
            if first_limit_s is not None:
                self._pairs.first_stall.append(Pair(ours_s=first.stall_s, limit_s=first_limit_s))
            steady = self._steady_saves(state, scope.saves)
            background = self._background_saves(state, scope.saves)
            peak_bytes, dirty_bytes = self._peak_memory(state) if scope.memory else (0, 0)
            slowdowns = self._slowdowns(state, scope.slowdowns)
            last = self._path()
            if scope.loads:
                self._timed(state, last)
                self._restores(state, last, scope.loads, restore)
        finally:
            self._system.close()
        if isinstance(self._system, Ckptd) and self._limits is not None and scope.loads:
            self._tell("cold loads, with and without hashes")
            measure_cold(self._system, state, last, loads=scope.loads, into=restore)
        return SystemResult(
            system=self._name,
            nbytes=bytes_of(state),
            tensors=len(tensors_of(state)),
            open_s=open_s,
            first=first,
            steady=steady,
            background=background,
            slowdowns=slowdowns,
            peak_extra_bytes=max(0, peak_bytes - without),
            peak_dirty_bytes=dirty_bytes,
            cold_load_s=self._loads(state, last, scope.loads, cold=True),
            warm_load_s=self._loads(state, last, scope.loads, cold=False),
            pairs=None if self._limits is None else self._pairs,
            restore=restore if restore.verified else None,
        )

    def _path(self) -> Path:
        return self._directory / f"{self._name}-{next(self._numbers)}"

    # --- saves ---------------------------------------------------------------------------------------------------

    def _saves(self, state: StateDict, saves: int, what: str) -> list[SaveSample]:
        samples = []
        for number in range(saves):
            self._tell(f"{what} {number + 1} of {saves}")
            path = self._path()
            samples.append(self._timed(state, path))
            measure.delete_and_settle(path)
        return samples

    def _steady_saves(self, state: StateDict, saves: int) -> list[SaveSample]:
        """Save, each time after a look at what the machine can do."""
        samples: list[SaveSample] = []
        for number in range(saves):
            if self._limits is None:
                samples += self._saves(state, 1, f"save {number + 1} of {saves}:")
                continue
            write_s, memcpy_s = self._limits.write_s(), self._limits.memcpy_s()
            [sample] = self._saves(state, 1, f"save {number + 1} of {saves}:")
            self._pairs.stall.append(Pair(ours_s=sample.stall_s, limit_s=memcpy_s))
            self._pairs.persist.append(Pair(ours_s=sample.persist_s, limit_s=write_s))
            samples.append(sample)
        return samples

    def _background_saves(self, state: StateDict, saves: int) -> list[SaveSample]:
        if not (isinstance(self._system, Ckptd) and self._system.is_plain):
            return []
        self._system.in_background = True
        try:
            return self._saves(state, saves, "background save")
        finally:
            self._system.in_background = False

    def _timed(self, state: StateDict, path: Path) -> SaveSample:
        ends: dict[str, float] = {}
        cpu = measure.CpuMeter(self._system.daemons())
        begun = time.perf_counter()
        pending = self._system.begin(state, path)
        returned = time.perf_counter()
        if pending.durable.done():
            ends["announced"] = returned
        if pending.staged is not None:
            pending.staged.add_done_callback(lambda _: ends.setdefault("staged", time.perf_counter()))
        pending.durable.add_done_callback(lambda _: ends.setdefault("announced", time.perf_counter()))
        pending.durable.result()
        finished = time.perf_counter()
        cpu_s = cpu.stop()
        return SaveSample(
            stall_s=returned - begun,
            staged_s=ends.get("staged", returned) - begun,
            # The callback may still be about to run when result() is back.
            announced_s=min(ends.get("announced", finished), finished) - begun,
            durable_s=finished - begun,
            cpu_s=cpu_s,
        )

    def _peak_memory(self, state: StateDict) -> tuple[int, int]:
        self._tell("memory")
        path = self._path()
        with measure.PeakMemory(self._system.daemons()) as peak:
            self._timed(state, path)
        measure.delete_and_settle(path)
        return peak.peak_bytes, peak.peak_dirty_bytes

    # --- a matmul loop beside a save -----------------------------------------------------------------------------

    def _slowdowns(self, state: StateDict, saves: int) -> list[SlowdownSample]:
        return [
            sample
            for threads in thread_counts()
            for number in range(saves)
            for sample in [self._slowdown(state, threads, f"save {number + 1} of {saves}")]
        ]

    def _slowdown(self, state: StateDict, threads: int, what: str) -> SlowdownSample:
        self._tell(f"matmul with {threads} threads, {what}")
        path = self._path()

        def begin() -> Future[object]:
            pending = self._system.begin(state, path)
            if pending.staged is not None:
                pending.staged.result()
            return pending.durable

        return slowdown_beside(begin, threads=threads, settle=lambda: measure.delete_and_settle(path))

    # --- loads ---------------------------------------------------------------------------------------------------

    def _loads(self, state: StateDict, path: Path, loads: int, *, cold: bool) -> list[float]:
        seconds = []
        for number in range(loads):
            self._tell(f"{'cold' if cold else 'warm'} load {number + 1} of {loads}")
            seconds.append(self._load(state, path, cold=cold))
        return seconds

    def _restores(self, state: StateDict, path: Path, loads: int, into: RestoreSample) -> None:
        """Load the last save while the daemon still holds it."""
        if isinstance(self._system, Ckptd) and self._limits is not None:
            self._tell("loads from memory, with and without hashes")
            measure_memory(self._system, state, path, loads=loads, limits=self._limits, into=into)

    def _load(self, state: StateDict, path: Path, *, cold: bool) -> float:
        """Load once into cleared tensors and hold the outcome against what was there."""
        wanted = digest_of(state)
        clear(state)
        limit_s = self._limits.read_s(path) if cold and self._limits is not None else None
        (measure.drop_cache if cold else measure.warm_cache)(path)
        begun = time.perf_counter()
        self._system.load(state, path)
        seconds = time.perf_counter() - begun
        if limit_s is not None:
            self._pairs.cold_load.append(Pair(ours_s=seconds, limit_s=limit_s))
        if digest_of(state) != wanted:
            raise RuntimeError(f"{self._name} loaded other bytes than it saved")
        return seconds


def soak(nbytes: int, tensors: int, *, saves: int, directory: Path, tell: Callable[[str], None]) -> SoakResult:
    """Save a small model many times and note the resident memory of all of ckptd's processes.

    Args:
        nbytes: Wanted bytes of the state dict.
        tensors: Wanted number of tensors.
        saves: Number of saves after those that warm up.
        directory: Where the checkpoints go; one at a time lies there.
        tell: Called with what comes next.
    """
    state, system = make_state_dict(nbytes, tensors), Ckptd()
    result = SoakResult(nbytes=bytes_of(state), tensors=len(tensors_of(state)), saves=[], resident_bytes=[])
    try:
        system.open(state)
        _save_many(system, state, directory / "warm-up", range(_SOAK_WARM_UP_SAVES))
        for done in range(0, saves + 1, _SOAK_STEP_SAVES):
            tell(f"small save {done} of {saves}")
            result.saves.append(done)
            result.resident_bytes.append(measure.memory_bytes(measure.family(system.daemons())))
            if done < saves:
                steps = range(done, min(done + _SOAK_STEP_SAVES, saves))
                _save_many(system, state, directory / "soak", steps)
    finally:
        system.close()
    return result


def _save_many(system: System, state: StateDict, directory: Path, steps: Iterable[int]) -> None:
    for step in steps:
        path = directory / str(step)
        pending: Pending = system.begin(state, path)
        pending.durable.result()
        measure.delete(path)
