"""The files of one job on tmpfs: its arenas and plans, in a directory that only its user can enter.

A lock in it is held by the daemon and by the job's workers. A successor of a daemon that was killed waits for it: two
workers, the old one and the new, must not be at work on the same files.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from typing import Final

from ckptd.daemon.workers.supervisor import Identity
from ckptd.protocol.errors import SystemCallFailed

_LOCK: Final = "workers.lock"
_POLL_S: Final = 0.005


class JobFiles:
    """A directory that is made when it is first needed.

    Args:
        root: The daemon's own directory on tmpfs.
        identity: Whom the directory belongs to; None is the daemon's own user.
        on_made: Called when the directory has been made, before anything lies in it.
        directory: One that a daemon before us has made; "" makes a new one.
    """

    def __init__(
        self, root: str, identity: Identity | None, *, on_made: Callable[[], None], directory: str = ""
    ) -> None:
        self._root, self._identity, self._on_made = root, identity, on_made
        self._directory: str | None = directory or None
        self._lock: int | None = None

    @property
    def directory(self) -> str:
        """Path of the directory, or "" while there is none."""
        return self._directory or ""

    async def lock_out_older_workers(self) -> int:
        """Wait until no worker of an earlier daemon is left, and return the lock's descriptor for our own workers.

        The wait is bounded by the caller.

        Raises:
            SystemCallFailed: The lock cannot be made.
        """
        if self._lock is None:
            path = self.path(_LOCK)
            try:
                self._lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise SystemCallFailed("open", path, error.errno or 0) from None
        lock = self._lock
        while True:  # a thread that blocks in flock(2) could not be called off
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                await asyncio.sleep(_POLL_S)
            else:
                return lock

    @property
    def owner(self) -> tuple[int, int] | None:
        """Uid and gid that files are given to; None keeps ours."""
        return None if self._identity is None else (self._identity.uid, self._identity.gid)

    def path(self, name: str) -> str:
        """Return the path of a file of this job. Raises SystemCallFailed if the directory cannot be made."""
        if self._directory is None:
            try:
                directory = tempfile.mkdtemp(prefix="job-", dir=self._root)
                if self._identity is not None:
                    os.chown(directory, self._identity.uid, self._identity.gid)
            except OSError as error:
                raise SystemCallFailed("mkdir", self._root, error.errno or 0) from None
            self._directory = directory
            self._on_made()
        return os.path.join(self._directory, name)

    def remove(self) -> None:
        """Remove the directory and all in it."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None
