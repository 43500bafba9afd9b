"""Measures what a save costs the machine: CPU time and memory of a set of processes, and the page cache.

*Memory* is what a process holds of the machine's memory: anonymous and shared-memory pages that are resident, those
that several processes map counted once (proportional set size). *Extra memory* is that of the trainer, its descendants,
the daemon and its workers, less the trainer's before it opened its saver. Pages of files are the kernel's to take back
and are not in it: libraries, whose share depends on who else runs Python here, and the page cache; how much of that
waits to be written is told apart, for the whole machine.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final

import psutil

_libc = ctypes.CDLL(None, use_errno=True)
# Lines of smaps_rollup; a shared-memory page that n processes map adds a page / n to each of them. Linux 5.4 or later.
_COUNTED: Final = ("Pss_Anon:", "Pss_Shmem:")
_SAMPLE_INTERVAL_S: Final = 0.02
_READ_BYTES: Final = 8 << 20
# ext4 hands the freed blocks of a deleted checkpoint to the disk (mount option "discard") after the commit that sync
# waits for; half a second later the raw write rate was that of an untouched disk.
_SETTLE_S: Final = 0.5


def family(others: Iterable[int] = ()) -> list[psutil.Process]:
    """Return this process, the processes of ``others`` (pids), and all their descendants, each once."""
    found: dict[int, psutil.Process] = {}
    for pid in (os.getpid(), *others):
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            for member in (process, *process.children(recursive=True)):
                found[member.pid] = member
    return list(found.values())


class CpuMeter:
    """Counts the CPU-seconds, user and system, of this process and others, and of all their descendants.

    Finding the processes costs milliseconds of CPU itself, so it is done before this process's own clock is read first,
    and after it is read last.

    Args:
        others: Pids of processes to be counted that need not be descendants of this one.
    """

    def __init__(self, others: Iterable[int] = ()) -> None:
        self._others = tuple(others)
        self._begun_s = self._all_but_own_s() + _own_s()

    def stop(self) -> float:
        """Return the CPU-seconds since this object was made."""
        own_s = _own_s()
        return own_s + self._all_but_own_s() - self._begun_s

    def _all_but_own_s(self) -> float:
        return sum(_cpu_s(process) for process in family(self._others) if process.pid != os.getpid())


def _own_s() -> float:
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def _cpu_s(process: psutil.Process) -> float:
    """Return the CPU-seconds of a process and of its children that have ended; 0 if it has ended itself."""
    try:
        times = process.cpu_times()
        return _clock_s(process.pid) + float(times.children_user + times.children_system)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return 0.0


def _clock_s(pid: int) -> float:
    """Return the CPU-seconds of one process to the nanosecond; /proc tells them to 10 ms only."""
    clock = ctypes.c_int()
    number = _libc.clock_getcpuclockid(pid, ctypes.byref(clock))
    if number != 0:
        raise ProcessLookupError(number, os.strerror(number))
    return time.clock_gettime(clock.value)


def memory_bytes(processes: Iterable[psutil.Process]) -> int:
    """Return the resident memory of processes in bytes: private pages, and common ones counted once."""
    return sum(_memory_bytes(process.pid) for process in processes)


def _memory_bytes(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text("ascii")
    except (FileNotFoundError, ProcessLookupError):
        return 0  # it has ended meanwhile
    counted = (line.split() for line in text.splitlines() if line.startswith(_COUNTED))
    return sum(int(words[1]) * 1024 for words in counted)


def _dirty_bytes() -> int:
    lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Dirty:", "Writeback:")))


class PeakMemory:
    """Samples memory in a thread while its block runs; slows what runs beside it, so nothing is timed there.

    Attributes:
        peak_bytes: Most memory of all the processes together.
        peak_dirty_bytes: Most page cache of the machine that waited to be written.
    """

    def __init__(self, others: Iterable[int]) -> None:
        self.peak_bytes = self.peak_dirty_bytes = 0
        self._others = tuple(others)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_over, name="bench-memory", daemon=True)

    def _sample_until_over(self) -> None:
        while not self._over.wait(_SAMPLE_INTERVAL_S):
            self.peak_bytes = max(self.peak_bytes, memory_bytes(family(self._others)))
            self.peak_dirty_bytes = max(self.peak_dirty_bytes, _dirty_bytes())

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, trace: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def drop_cache(directory: Path) -> None:
    """Drop the files of a directory from the page cache; what is dirty is written first."""
    os.sync()
    for path in _files(directory):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def warm_cache(directory: Path) -> None:
    """Bring the files of a directory into the page cache."""
    buffer = memoryview(bytearray(_READ_BYTES))
    for path in _files(directory):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def delete(path: Path) -> None:
    """Delete a checkpoint or a file."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def delete_and_settle(path: Path) -> None:
    """Delete a checkpoint or a file and wait until the disk has recovered from that."""
    delete(path)
    os.sync()
    time.sleep(_SETTLE_S)
