"""Room on the volumes in use, looked at by a thread of its own: a network volume that hangs must hang nobody else.

Invariant: :meth:`VolumeWatch.rooms` never touches a file system; it returns the last look and how old it is.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from ckptd.daemon.monitoring.labels import Volume

_LOOK_INTERVAL_S: Final = 5.0
# Directories of checkpoints that are looked at: those of the last saves, over all jobs.
_DIRECTORIES: Final = 16


@dataclass(frozen=True)
class Room:
    """Size and room of a volume, in bytes, and the age of the look, in seconds."""

    size_bytes: int
    free_bytes: int
    age_s: float = 0.0

    @property
    def free_ratio(self) -> float:
        """Part of the volume that is free, 0 to 1; 1 for a volume that does not tell its size."""
        return self.free_bytes / self.size_bytes if self.size_bytes else 1.0


class VolumeWatch:
    """Looks at volumes every few seconds while it runs.

    Args:
        shm_dir: The tmpfs of the arenas.
        look: Returns the room of the volume of a path; raises OSError.
    """

    def __init__(self, shm_dir: str, *, look: Callable[[str], Room] | None = None) -> None:
        self._shm_dir = shm_dir
        self._look = look or look_at
        self._directories: dict[str, None] = {}  # ordered: the newest last
        self._rooms: dict[Volume, tuple[Room, float]] = {}
        self._wake = threading.Event()
        self._closed = False
        self._lock = threading.Lock()

    def start(self) -> None:
        """Begin to look. The thread is a daemon thread: one that hangs in the kernel must not keep the process."""
        threading.Thread(target=self._run, name="volumes", daemon=True).start()

    def close(self) -> None:
        """Look no more."""
        self._closed = True
        self._wake.set()

    def used(self, directory: str) -> None:
        """A checkpoint was, or will be, written into ``directory``: its volume is in use."""
        with self._lock:
            known = directory in self._directories
            self._directories.pop(directory, None)
            self._directories[directory] = None
            while len(self._directories) > _DIRECTORIES:
                del self._directories[next(iter(self._directories))]
        if not known:
            self._wake.set()

    def rooms(self) -> Mapping[Volume, Room]:
        """Return the last look at each kind of volume; of the checkpoints' volumes, the fullest."""
        now = time.monotonic()
        return {name: Room(room.size_bytes, room.free_bytes, now - at_s) for name, (room, at_s) in self._rooms.items()}

    def look_once(self) -> None:
        """Look at all volumes; where one has an error of its own, the last look stays, and grows old."""
        with self._lock:
            directories = list(self._directories)
        self._note("shm", [self._shm_dir])
        self._note("checkpoints", directories)

    def _note(self, name: Volume, paths: list[str]) -> None:
        try:
            rooms = [room for path in paths if (room := self._room(path)) is not None]
        except OSError:
            return
        if rooms:
            fullest = min(rooms, key=lambda room: room.free_ratio)
            self._rooms[name] = fullest, time.monotonic()
        else:
            self._rooms.pop(name, None)

    def _room(self, path: str) -> Room | None:
        """Return None for a path that is no place for checkpoints, or that we may not see: no volume is to blame."""
        try:
            return self._look(path)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return None

    def _run(self) -> None:
        while not self._closed:
            self._wake.clear()
            self.look_once()
            self._wake.wait(_LOOK_INTERVAL_S)


def look_at(path: str) -> Room:
    """Return the room of the volume that holds ``path``, or its nearest ancestor that exists. Raises OSError."""
    while True:
        try:
            volume = os.statvfs(path)
        except FileNotFoundError:
            parent = os.path.dirname(path)
            if parent == path:
                raise
            path = parent
        else:
            return Room(volume.f_blocks * volume.f_frsize, volume.f_bavail * volume.f_frsize)
