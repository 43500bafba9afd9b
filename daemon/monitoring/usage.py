"""What the daemon's processes use, by role: a worker's pid is no label, and its end must not lower a counter."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import psutil

from ckptd.daemon.monitoring.labels import Role


@dataclass(frozen=True)
class Usage:
    """What the processes of one role use together.

    Attributes:
        cpu_s: Seconds of processor time, those of ended processes included as far as they were seen.
        private_bytes: Resident memory that is theirs alone.
        shared_bytes: Resident pages of files and of tmpfs; an arena counts once per process that has touched it.
        descriptors: Open file descriptors.
    """

    cpu_s: float = 0.0
    private_bytes: int = 0
    shared_bytes: int = 0
    descriptors: int = 0


class UsageMeter:
    """Reads ``/proc`` when it is asked, and remembers what ended processes had used."""

    def __init__(self) -> None:
        self._daemon = psutil.Process(os.getpid())
        self._workers: dict[int, psutil.Process] = {}
        self._seen_cpu_s: dict[int, float] = {}
        self._ended_cpu_s = 0.0

    def read(self, worker_pids: Iterable[int]) -> Mapping[Role, Usage]:
        """Return the use of each role; a process that ends meanwhile is left out."""
        live = self._follow(set(worker_pids))
        usages = [usage for pid, process in live.items() if (usage := self._look(pid, process)) is not None]
        workers = Usage(
            cpu_s=self._ended_cpu_s + sum(self._seen_cpu_s.values()),
            private_bytes=sum(usage.private_bytes for usage in usages),
            shared_bytes=sum(usage.shared_bytes for usage in usages),
            descriptors=sum(usage.descriptors for usage in usages),
        )
        return {"daemon": _read(self._daemon), "worker": workers}

    def _follow(self, pids: set[int]) -> dict[int, psutil.Process]:
        for pid in self._workers.keys() - pids:
            del self._workers[pid]
            self._ended_cpu_s += self._seen_cpu_s.pop(pid, 0.0)
        for pid in pids - self._workers.keys():
            with suppress(psutil.Error):
                self._workers[pid] = psutil.Process(pid)
        return self._workers

    def _look(self, pid: int, process: psutil.Process) -> Usage | None:
        try:
            usage = _read(process)
        except psutil.Error:
            return None
        self._seen_cpu_s[pid] = max(usage.cpu_s, self._seen_cpu_s.get(pid, 0.0))
        return usage


def _read(process: psutil.Process) -> Usage:
    with process.oneshot():
        memory = process.memory_info()
        times = process.cpu_times()
    try:
        descriptors = process.num_fds()
    except psutil.AccessDenied:  # a worker under another uid, seen by a daemon without the rights of root
        descriptors = 0
    return Usage(times.user + times.system, max(0, memory.rss - memory.shared), memory.shared, descriptors)
