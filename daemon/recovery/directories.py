"""The three directories of a daemon: sockets, shared memory, journal. The kernel drops their locks when it dies.

Invariant: of two daemons with the same runtime directory, or at work on the same journal, one does not start.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterator
from typing import Final

from ckptd.daemon.recovery.journal import journal_file, try_lock
from ckptd.protocol.errors import Forbidden, SystemCallFailed
from ckptd.protocol.paths import state_dir
from ckptd.staging.arena import is_held

logger = logging.getLogger(__name__)

_LOCK: Final = "lock"
# Another daemon looks into the journals of dead ones, and holds their locks for a moment.
_PATIENCE_S: Final = 5.0
_POLL_S: Final = 0.01


class Directories:
    """Where one daemon keeps its things. Making it takes the locks.

    Args:
        runtime: Directory of the sockets.
        shm: The tmpfs of the arenas.
        everyone: Whether other users may enter the runtime directory.

    Raises:
        SystemCallFailed: A directory or a lock cannot be had: another daemon may be running here.
        Forbidden: The runtime directory is another user's.
    """

    def __init__(self, runtime: str, shm: str, *, everyone: bool) -> None:
        self.runtime, self._shm = runtime, shm
        where = name_for(runtime)
        self.root = os.path.join(shm, f"ckptd-{os.geteuid()}-{where}")
        self._locks: list[int] = []
        try:
            self._make_runtime(everyone=everyone)
            # Users' own directories lie below: they may pass, not list.
            self._make(self.root, 0o711)
            self._locks.append(_locked(self.root, os.O_RDONLY | os.O_DIRECTORY))
            self._states = self._make_states()
            self.state = os.path.join(self._states, where)
            self._locks.append(self._lock_state())
        except BaseException:
            self.release()
            raise

    def _make_runtime(self, *, everyone: bool) -> None:
        self._make(self.runtime, 0o755 if everyone else 0o700)
        owner = os.stat(self.runtime).st_uid
        if owner != os.geteuid():
            raise Forbidden(os.geteuid(), owner)
        self._locks.append(_locked(os.path.join(self.runtime, _LOCK), os.O_RDWR | os.O_CREAT))

    def _make(self, directory: str, mode: int) -> None:
        try:
            os.makedirs(directory, mode=mode, exist_ok=True)
        except OSError as error:
            raise SystemCallFailed("mkdir", directory, error.errno or 0) from None

    def _make_states(self) -> str:
        """Return the directory of all journals of this user; without a writable home it lies with the sockets."""
        states = state_dir()
        try:
            self._make(states, 0o700)
        except SystemCallFailed as error:
            if os.environ.get("CKPTD_STATE_DIR"):
                raise
            states = os.path.join(self.runtime, "state")
            logger.warning("%s; the journal lies in %s, set CKPTD_STATE_DIR for another place", error, states)
            self._make(states, 0o700)
        return states

    def _lock_state(self) -> int:
        deadline = time.monotonic() + _PATIENCE_S
        while (lock := try_lock(self.state)) is None:
            if time.monotonic() > deadline:
                raise SystemCallFailed("lock", self.state, errno.EWOULDBLOCK)
            time.sleep(_POLL_S)
        return lock

    def journals_of_the_dead(self) -> Iterator[str]:
        """Yield the state directories that no daemon holds; each is ours until the caller asks for the next one."""
        for name in sorted(os.listdir(self._states)):
            directory = os.path.join(self._states, name)
            if directory == self.state or not os.path.exists(journal_file(directory)):
                continue
            try:
                lock = try_lock(directory)
            except SystemCallFailed as error:
                logger.warning("cannot look into a journal: %s", error)
                continue
            if lock is not None:
                try:
                    yield directory
                finally:
                    os.close(lock)

    def clear_root(self, kept: set[str]) -> None:
        """Remove what lies in our directory on tmpfs and is none of the ``kept`` directories: a dead daemon's."""
        for name in os.listdir(self.root):
            path = os.path.join(self.root, name)
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def reclaim_orphans(self, kept: set[str], *, older_than_s: float) -> list[str]:
        """Remove other daemons' directories on tmpfs whose daemon is dead, and of which no process uses an arena.

        Args:
            kept: Directories of jobs that we have taken up, wherever they lie.
            older_than_s: What was changed later is left alone: its own daemon may be on its way.

        Returns:
            What was removed.
        """
        removed = []
        for name in os.listdir(self._shm):
            root = os.path.join(self._shm, name)
            if not name.startswith(f"ckptd-{os.geteuid()}-") or root == self.root:
                continue
            if any(os.path.dirname(directory) == root for directory in kept) or _age_s(root) < older_than_s:
                continue
            with contextlib.suppress(SystemCallFailed):  # its daemon lives
                lock = _locked(root, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    if not _in_use(root):
                        shutil.rmtree(root, ignore_errors=True)
                        removed.append(root)
                finally:
                    os.close(lock)
        return removed

    def release(self, *, emptied: bool = False) -> None:
        """Give the locks back; ``emptied``: nothing is left for a successor, so our directory on tmpfs goes, too."""
        if emptied:
            shutil.rmtree(self.root, ignore_errors=True)
        for lock in self._locks:
            os.close(lock)
        self._locks = []


def name_for(runtime: str) -> str:
    """Return what tells the directories of a daemon, on tmpfs and of its journal, from those of others."""
    return hashlib.blake2s(runtime.encode(), digest_size=6).hexdigest()


def _locked(path: str, flags: int) -> int:
    """Take the lock of a file or directory and return its descriptor.

    Raises:
        SystemCallFailed: Another process holds it, or it cannot be opened.
    """
    try:
        lock = os.open(path, flags | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise SystemCallFailed("lock", path, error.errno or 0) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise SystemCallFailed("lock", path, error.errno or 0) from None
    return lock


def _files_below(root: str) -> Iterator[str]:
    for directory, _, names in os.walk(root):
        for name in names:
            yield os.path.join(directory, name)


def _age_s(root: str) -> float:
    newest = 0.0
    for path in [root, *_files_below(root)]:
        with contextlib.suppress(FileNotFoundError):
            newest = max(newest, os.stat(path).st_mtime)
    return time.time() - newest


def _in_use(root: str) -> bool:
    """Return whether a client marks an arena below as in use, or a worker is still at work there."""
    for path in _files_below(root):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            if is_held(descriptor):
                return True
        finally:
            os.close(descriptor)
    return False
