"""What a disk may hold after the power fails in the middle of recorded system calls.

A small model file system: directories, files, and what of them is durable. Whatever no fsync has covered may be lost
or kept, each call by itself and in any combination: names by the fsync of their directory, bytes by that of their file.
One rename, exchange or unlink is atomic, as journals make it; nothing else is taken for granted, not even order.
"""

from __future__ import annotations

import itertools
import os
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# All combinations of so many calls are looked at; of more, samples.
_EXHAUSTIVE_AT_MOST = 8
_SAMPLES = 24

_CALL = re.compile(r"(\w+)\((.*)\)\s+= (-?\d+)(?:<(.*)>)?")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')
_DESCRIPTOR = re.compile(r"(?:AT_FDCWD|\d+)<([^>]*)>")


@dataclass(frozen=True)
class Write:
    """Bytes that went into a file; ``number`` is unlike that of any other write."""

    inode: int
    offset: int
    nbytes: int
    number: int


@dataclass(frozen=True)
class Rename:
    """Names that got other meanings in one step: of a directory's inode, a name, and what it now means, if anything."""

    changes: tuple[tuple[int, str, int | None], ...]


@dataclass(frozen=True)
class Sync:
    """An fsync that succeeded, of a file or directory."""

    inode: int
    path: str


Step = Write | Rename | Sync


@dataclass(frozen=True)
class Disk:
    """What is there after the power has failed.

    Attributes:
        names: Of each directory's inode, what it holds.
        writes: Of each file's inode, the writes that have reached it.
    """

    names: dict[int, dict[str, int]]
    writes: dict[int, frozenset[Write]]


@dataclass
class Recording:
    """Steps below a root directory, in order, from a state that was durable.

    Attributes:
        root: The directory; its inode is 0.
        before: What every directory held before the first step, by inode.
        steps: What happened.
    """

    root: str
    before: dict[int, dict[str, int]]
    steps: list[Step] = field(default_factory=list)

    def find(self, names: dict[int, dict[str, int]], path: str) -> int | None:
        """Return the inode that a path below the root means, or None."""
        inode: int | None = 0
        for part in Path(path).relative_to(self.root).parts:
            inode = names.get(inode, {}).get(part) if inode is not None else None
        return inode

    def all_lost(self, count: int) -> Disk:
        """Return the disk that has only what was synced."""
        return self._apply(sorted(set(range(count)) - set(self._pending(count))))

    def all_kept(self, count: int) -> Disk:
        """Return the disk that has everything, which is also what is seen while the machine runs on."""
        return self._apply(range(count))

    def without(self, *numbers: int) -> Recording:
        """Return the recording without some steps: what a careless program would have done."""
        kept = [step for number, step in enumerate(self.steps) if number not in numbers]
        return Recording(self.root, self.before, kept)

    def disks(self, count: int, *, seed: int = 0) -> Iterator[Disk]:
        """Yield what the disk may hold if the power fails after so many steps."""
        pending = self._pending(count)
        durable = set(range(count)) - set(pending)
        for kept in _subsets(pending, random.Random(seed * 1_000_003 + count)):
            yield self._apply(sorted(durable | set(kept)))

    def _pending(self, count: int) -> list[int]:
        """Return the steps that no fsync has covered."""
        synced: set[int] = set()
        pending = []
        for number in range(count - 1, -1, -1):
            step = self.steps[number]
            if isinstance(step, Sync):
                synced.add(step.inode)
                continue
            concerned = step.inode if isinstance(step, Write) else step.changes[-1][0]
            if concerned not in synced:
                pending.append(number)
        return pending[::-1]

    def _apply(self, numbers: range | list[int]) -> Disk:
        names = {inode: dict(held) for inode, held in self.before.items()}
        writes: dict[int, set[Write]] = {}
        for number in numbers:
            step = self.steps[number]
            if isinstance(step, Write):
                writes.setdefault(step.inode, set()).add(step)
            elif isinstance(step, Rename):
                for directory, name, meaning in step.changes:
                    held = names.setdefault(directory, {})
                    held.pop(name, None)
                    if meaning is not None:
                        held[name] = meaning
        return Disk(names, {inode: frozenset(all_of_it) for inode, all_of_it in writes.items()})


def _subsets(pending: list[int], chance: random.Random) -> Iterator[list[int]]:
    if len(pending) <= _EXHAUSTIVE_AT_MOST:
        for count in range(len(pending) + 1):
            yield from map(list, itertools.combinations(pending, count))
        return
    yield []
    yield pending
    for one in pending:
        yield [one]
        yield [other for other in pending if other != one]
    for at in range(len(pending)):
        yield pending[:at]
        yield pending[at:]
    for _ in range(_SAMPLES):
        share = chance.random()
        yield [one for one in pending if chance.random() < share]


def snapshot(root) -> Recording:
    """Return a recording without steps that begins at what lies below a directory."""
    before: dict[int, dict[str, int]] = {}
    inodes: dict[tuple[int, int], int] = {_key(root): 0}
    for folder, folders, files in os.walk(root):
        here = inodes.setdefault(_key(folder), len(inodes))
        before[here] = {
            name: inodes.setdefault(_key(os.path.join(folder, name)), len(inodes)) for name in [*folders, *files]
        }
    return Recording(str(root), before)


def _key(path) -> tuple[int, int]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino


class Recorder:
    """Turns strace's lines into steps."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self._names = {inode: dict(held) for inode, held in recording.before.items()}
        self._next = 1 + max((inode for held in self._names.values() for inode in held.values()), default=0)
        self._ends: dict[int, int] = {}  # where the next write(2) into a file goes

    def line(self, text: str) -> None:
        """Take one call, as ``strace -y`` tells it."""
        match = _CALL.fullmatch(text)
        if match is None or int(match[3]) < 0:
            return
        call, arguments, result, opened = match[1], match[2], int(match[3]), match[4]
        paths = self._paths(arguments)
        match call:
            case "openat" | "open" | "creat" if "O_CREAT" in arguments:
                self._create(opened)
            case "mkdir" | "mkdirat":
                self._create(paths[0], folder=True)
            case "write" | "pwrite64":
                self._write(_DESCRIPTOR.match(arguments)[1], arguments if call == "pwrite64" else None, result)
            case "fsync" | "fdatasync":
                path = _DESCRIPTOR.match(arguments)[1]
                if (inode := self._find(path)) is not None:
                    self.recording.steps.append(Sync(inode, path))
            case "rename" | "renameat" | "renameat2":
                self._rename(*paths, exchange="RENAME_EXCHANGE" in arguments)
            case "link" | "linkat":
                self._change((paths[1], self._find(paths[0])))
            case "unlink" | "unlinkat" | "rmdir":
                self._change((paths[0], None))

    def _paths(self, arguments: str) -> list[str]:
        """Return the absolute paths among the arguments."""
        found = []
        for match in re.finditer(rf"(?:{_DESCRIPTOR.pattern}, )?{_STRING.pattern}", arguments):
            found.append(os.path.normpath(os.path.join(match[1] or "/", match[2])))
        return found

    def _find(self, path: str) -> int | None:
        if path != self.recording.root and not path.startswith(f"{self.recording.root}/"):
            return None
        return self.recording.find(self._names, path)

    def _create(self, path: str, *, folder: bool = False) -> None:
        if self._find(os.path.dirname(path)) is None or self._find(path) is not None:
            return
        inode, self._next = self._next, self._next + 1
        if folder:
            self._names[inode] = {}
        self._change((path, inode))

    def _write(self, path: str, placed: str | None, nbytes: int) -> None:
        inode = self._find(path)
        if inode is None or not nbytes:
            return
        offset = self._ends.get(inode, 0) if placed is None else int(placed.rpartition(", ")[2])
        self._ends[inode] = offset + nbytes
        self.recording.steps.append(Write(inode, offset, nbytes, len(self.recording.steps)))

    def _rename(self, source: str, target: str, *, exchange: bool) -> None:
        moved, replaced = self._find(source), self._find(target)
        if moved is not None:
            self._change((source, replaced if exchange else None), (target, moved))

    def _change(self, *changes: tuple[str, int | None]) -> None:
        step = []
        for path, meaning in changes:
            directory = self._find(os.path.dirname(path))
            if directory is None:
                return
            step.append((directory, os.path.basename(path), meaning))
        for directory, name, meaning in step:
            self._names[directory].pop(name, None)
            if meaning is not None:
                self._names[directory][name] = meaning
        self.recording.steps.append(Rename(tuple(step)))


def record(before: Recording, lines: list[str]) -> Recording:
    """Return the steps of some calls, told by strace, from a snapshot on."""
    recorder = Recorder(Recording(before.root, before.before))
    for line in lines:
        recorder.line(line)
    return recorder.recording
