"""Describes the machine that the numbers were measured on; they mean little without it."""

from __future__ import annotations

import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import psutil


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Where and when a run took place.

    Attributes:
        load: Processes that were running or wanted to, on average over the minute before the run.
    """

    started: str
    cpu: str
    cores: int
    memory_bytes: int
    kernel: str
    python: str
    torch: str
    ckptd: str
    directory: str
    file_system: str
    load: float

    def lines(self) -> list[str]:
        """Return the description in words."""
        return [
            f"{self.cpu}, {self.cores} cores, {self.memory_bytes / 1e9:.0f} GB, Linux {self.kernel}",
            f"ckptd {self.ckptd}, torch {self.torch}, Python {self.python}; {self.started}",
            f"checkpoints in {self.directory} on {self.file_system}; load before the run {self.load:.1f}",
        ]


def describe(directory: Path) -> Machine:
    """Return the description of this machine.

    Args:
        directory: Where the checkpoints go.
    """
    from importlib.metadata import version

    import ckptd

    return Machine(
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=psutil.virtual_memory().total,
        kernel=platform.release(),
        python=platform.python_version(),
        torch=version("torch"),
        ckptd=ckptd.__version__,
        directory=str(directory),
        file_system=file_system(directory),
        load=os.getloadavg()[0],
    )


class Others:
    """Watches how much of the machine goes to others while this process's children run, to tell noisy numbers.

    The kernel's own threads, which write the page cache back, count as others.
    """

    def __init__(self) -> None:
        self._begun_s, self._busy_s, self._own_s = time.perf_counter(), _machine_s(), _own_s()

    def share(self) -> float:
        """Return the share of all cores' time since this object was made, 0 to 1."""
        seconds = (time.perf_counter() - self._begun_s) * (os.cpu_count() or 1)
        others_s = _machine_s() - self._busy_s - (_own_s() - self._own_s)
        return min(1.0, max(0.0, others_s / seconds))


def _machine_s() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def _own_s() -> float:
    return sum(os.times()[:4])


def file_system(directory: Path) -> str:
    """Return type and device of the file system that a directory lies on, as in ``ext4 on /dev/vda``."""
    resolved = directory.resolve()
    holding = [part for part in psutil.disk_partitions(all=True) if resolved.is_relative_to(Path(part.mountpoint))]
    if not holding:
        return "unknown"
    # Of mounts on one another the last is what is seen; max() keeps the first of equals.
    nearest = max(reversed(holding), key=lambda part: len(part.mountpoint))
    return f"{nearest.fstype} on {nearest.device}"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
