"""After a failure: loads from the memory that a daemon holds, the price of hashes, a killed daemon's successor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import msgspec
import psutil

from benchmarks import measure
from benchmarks.limits import PairedLimits
from benchmarks.samples import AdoptionResult, Pair, RestoreSample
from benchmarks.systems import Ckptd
from benchmarks.workload import StateDict, clear, digest_of, make_state_dict

# Pairs of loads with and without hashes, for each load that is asked for: what is to be seen is a few percent.
_PAIRS_PER_LOAD: Final = 4
_ADOPTED_BYTES: Final = 1_000_000
_ADOPTED_TENSORS: Final = 64
_ENDS_WITHIN_S: Final = 60.0


def measure_memory(
    system: Ckptd, state: StateDict, path: Path, *, loads: int, limits: PairedLimits, into: RestoreSample
) -> None:
    """Load a save from memory, as a restarted trainer does.

    Args:
        system: Its last save must be this one; its session ends here.
        state: What was saved.
        path: The checkpoint.
        loads: How often.
        limits: The machine's own figures.
        into: Where the figures go.
    """
    system.end_session()
    for _ in range(loads):
        limit_s = limits.read_s(path)
        into.against_disk.append(Pair(ours_s=_load(system, state, path, "memory"), limit_s=limit_s))
    into.verified.extend(_with_and_without_hashes(system, state, path, "memory", pairs=loads * _PAIRS_PER_LOAD))


def measure_cold(system: Ckptd, state: StateDict, path: Path, *, loads: int, into: RestoreSample) -> None:
    """Load from the disk with and without hashes, once the daemon has ended. Arguments as above."""
    into.verified_cold.extend(_with_and_without_hashes(system, state, path, "disk", pairs=loads * _PAIRS_PER_LOAD))


def _with_and_without_hashes(system: Ckptd, state: StateDict, path: Path, source: str, *, pairs: int) -> Iterator[Pair]:
    """Yield pairs of loads; which of the two comes first alternates."""
    for number in range(pairs):
        seconds = {
            verify: _load(system, state, path, source, verify=verify)
            for verify in ((True, False), (False, True))[number % 2]
        }
        yield Pair(ours_s=seconds[True], limit_s=seconds[False])


def _load(system: Ckptd, state: StateDict, path: Path, source: str, *, verify: bool = True) -> float:
    """Load into cleared tensors, check what came from where, and return the seconds."""
    wanted = digest_of(state)
    clear(state)
    if source == "disk":
        measure.drop_cache(path)
    begun = time.perf_counter()
    found = system.load_verified(state, path, verify=verify)
    seconds = time.perf_counter() - begun
    if found != source or digest_of(state) != wanted:
        raise RuntimeError(f"{path} was loaded from {found}, or other bytes came than were saved")
    return seconds


def measure_adoption(generations: int, directory: Path, *, repeats: int, tell: Callable[[str], None]) -> AdoptionResult:
    """Kill a daemon that holds sealed saves, of which nothing is written, and time its successor.

    Args:
        generations: Number of saves, all of one trainer, which lives on.
        directory: Where the checkpoints go.
        repeats: How often.
        tell: Called with what comes next.
    """
    result = AdoptionResult(generations=generations, ready_s=[], finished_s=[])
    for number in range(repeats):
        tell(f"successor of a killed daemon {number + 1} of {repeats}")
        with tempfile.TemporaryDirectory(prefix="ckptd-bench-") as runtime:
            place = directory / f"adoption-{number}"
            os.environ.update(CKPTD_RUNTIME_DIR=runtime, CKPTD_STATE_DIR=runtime, CKPTD_EMBEDDED="0")
            try:
                ready_s, finished_s = _adopt_once(generations, place, Path(runtime, "daemon.log"))
            finally:
                os.environ.pop("CKPTD_EMBEDDED")
            result.ready_s.append(ready_s)
            result.finished_s.append(finished_s)
            measure.delete_and_settle(place)
    return result


def _adopt_once(generations: int, place: Path, log: Path) -> tuple[float, float]:
    import ckptd.client as dcp

    state = make_state_dict(_ADOPTED_BYTES, _ADOPTED_TENSORS)
    with _daemon(log) as first:
        session = dcp.connect(state, slots=generations)
        try:
            dcp.save(state, checkpoint_id=place / "first")
            workers = psutil.Process(first.pid).children()
            for worker in workers:
                worker.suspend()
            futures = [dcp.async_save(state, checkpoint_id=place / str(number)) for number in range(generations)]
            _wait_until_heard(runtime_of=log.parent, sealed=generations)
            for process in (psutil.Process(first.pid), *workers):
                process.kill()
            first.wait()
            begun = time.perf_counter()
            with _daemon(log):
                ready_s = time.perf_counter() - begun
                for future in futures:
                    future.result()
                finished_s = time.perf_counter() - begun
                session.close()
        finally:
            session.close()
    return ready_s, finished_s


def _wait_until_heard(*, runtime_of: Path, sealed: int) -> None:
    """Wait until the daemon has taken up so many seals: only those stand in its journal."""
    import urllib.request

    address = (runtime_of / "http").read_text("ascii").strip()
    deadline = time.monotonic() + _ENDS_WITHIN_S
    while time.monotonic() < deadline:
        with urllib.request.urlopen(f"http://{address}/status", timeout=_ENDS_WITHIN_S) as answer:
            [job] = msgspec.json.decode(answer.read())["jobs"]
        if sum(save["state"] == "staged" for save in job["generations"]) == sealed:
            return
        time.sleep(0.01)
    raise RuntimeError(f"the daemon has not heard of {sealed} saves")


@contextmanager
def _daemon(log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a daemon; it serves, and has taken up what was left to it, when the block begins."""
    with log.open("ab") as errors:
        command = [sys.executable, "-P", "-m", "ckptd.daemon", "--mode", "user", "--http", "127.0.0.1:0"]
        daemon = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors)
    try:
        assert daemon.stdout is not None
        if not daemon.stdout.readline():
            raise RuntimeError(f"the daemon did not come up: {log.read_text('utf-8', 'replace')[-2000:]}")
        yield daemon
    finally:
        with suppress(ProcessLookupError):
            daemon.send_signal(signal.SIGTERM)
        daemon.wait(_ENDS_WITHIN_S)
        assert daemon.stdout is not None
        daemon.stdout.close()
