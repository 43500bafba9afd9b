"""What bounds the memory of a new arena: room on the tmpfs, free memory, and the limits of control groups.

Pages of a tmpfs are charged to the control group of whoever touches them first. That is the daemon; the trainer's
limits are looked at as well, because a job that was granted so much should not stage more beside it.
Sources: proc(5) for MemAvailable, cgroups(7), the kernel's admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from ckptd.protocol.admission import Limit

# cgroup v1 says "no limit" by the largest multiple of a page that fits a long.
_NO_LIMIT_BYTES: Final = 1 << 62


@dataclass(frozen=True)
class _Files:
    """The files of one version of the memory controller: limits, usage, and its cache in memory.stat."""

    limits: tuple[str, ...]
    usage: str
    cache: tuple[str, ...]


_VERSIONS: Final = {
    "cgroup2": _Files(("memory.max", "memory.high"), "memory.current", ("active_file", "inactive_file")),
    "cgroup": _Files(("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
}


def memory_limits(directory: str, pids: Iterable[int], *, root: str = "") -> list[Limit]:
    """Return everything that bounds a new arena.

    Args:
        directory: On the tmpfs that will hold it.
        pids: Processes whose control groups count.
        root: Prefix of /proc and of the control groups' mounts, for tests.
    """
    volume = os.statvfs(directory)
    size_bytes = volume.f_blocks * volume.f_frsize
    limits = [Limit("", volume.f_bavail * volume.f_frsize, size_bytes, shared=False)]
    meminfo = _key_values(f"{root}/proc/meminfo", ":")
    if "MemAvailable" in meminfo:
        available, total = meminfo["MemAvailable"] * 1024, meminfo.get("MemTotal", 0) * 1024
        limits.append(Limit("the machine's free memory (MemAvailable)", available, total))
    seen: set[str] = set()
    for pid in pids:
        for folder, files in _groups_of(pid, root):
            if folder not in seen:
                seen.add(folder)
                limits.extend(_group_limits(folder, files, root))
    return limits


def _group_limits(folder: str, files: _Files, root: str) -> Iterator[Limit]:
    for name in files.limits:
        limit_bytes = _number(f"{folder}/{name}")
        if limit_bytes is None or limit_bytes >= _NO_LIMIT_BYTES:
            continue
        used_bytes = _number(f"{folder}/{files.usage}") or 0
        stat = _key_values(f"{folder}/memory.stat", " ")
        # Clean pages of files are given up before anybody is killed, as MemAvailable counts them, too.
        cache_bytes = sum(stat.get(key, 0) for key in files.cache)
        free_bytes = limit_bytes - max(0, used_bytes - cache_bytes)
        yield Limit(f"control group {folder.removeprefix(root)}/{name}", free_bytes, limit_bytes)


def _groups_of(pid: int, root: str) -> Iterator[tuple[str, _Files]]:
    """Yield the folders of a process's memory control groups, from its own to the outermost that can be seen."""
    mounts = _memory_mounts(root)
    for line in _lines(f"{root}/proc/{pid}/cgroup"):
        _, controllers, path = line.split(":", 2)
        kind = "cgroup2" if not controllers else "cgroup" if "memory" in controllers.split(",") else ""
        if kind not in mounts:
            continue
        mount, mounted = mounts[kind]
        inside = os.path.relpath(path, mounted)
        if inside.startswith(".."):
            continue  # outside of what this mount shows, as in another container
        while True:
            yield os.path.normpath(f"{root}{mount}/{inside}"), _VERSIONS[kind]
            if inside in {".", ""}:
                break
            inside = os.path.dirname(inside) or "."


def _memory_mounts(root: str) -> dict[str, tuple[str, str]]:
    """Return mount point and mounted folder of the memory controller, by file system. Format: proc_pid_mountinfo(5)."""
    found: dict[str, tuple[str, str]] = {}
    for line in _lines(f"{root}/proc/self/mountinfo"):
        fields, _, rest = line.partition(" - ")
        kind, _, options = rest.split(" ", 2)
        if kind == "cgroup2" or (kind == "cgroup" and "memory" in options.split(",")):
            mounted, mount = fields.split(" ")[3:5]
            found.setdefault(kind, (mount, mounted))
    return found


def _number(path: str) -> int | None:
    """Return the number in a file; None where there is none, or "max"."""
    text = "".join(_lines(path))
    return int(text) if text.isdigit() else None


def _key_values(path: str, separator: str) -> dict[str, int]:
    pairs = (line.partition(separator) for line in _lines(path))
    return {key: int(value.split()[0]) for key, _, value in pairs if value.split()[:1] and value.split()[0].isdigit()}


def _lines(path: str) -> list[str]:
    """Return a file's lines; none if it cannot be read: what nobody can see bounds nobody here."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().splitlines()
    except OSError:
        return []
