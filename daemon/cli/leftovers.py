"""What dead daemons and killed saves leave behind, as `ckptd gc` sees it: found, and judged.

Invariant: nothing is judged a leftover that a live daemon works on or a trainer waits for, that somebody locks, or that
changed lately. What becomes of a dead save's directory is decided by :mod:`ckptd.checkpoint.publishing.leftovers`; a
daemon's directory on tmpfs is locked as long as it lives (:mod:`ckptd.daemon.recovery.directories`).
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

from ckptd.checkpoint.names import is_removed, split_hidden
from ckptd.daemon.recovery.directories import name_for
from ckptd.protocol.errors import CkptdError, SystemCallFailed
from ckptd.protocol.paths import runtime_dir
from ckptd.staging.arena import SlotState, count_slots, is_held, read_slot

_ROOT: Final = re.compile(r"ckptd-(\d+)-([0-9a-f]{12})")
_BLOCK_BYTES: Final = 512  # of st_blocks, on every file system: stat(2)


# --- arenas ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ArenaDirectory:
    """A daemon's directory on tmpfs.

    Attributes:
        path: Where it is.
        uid: Whose daemon's it is.
        runtime: Runtime directory of its daemon, or "" if that is not known.
        live: Whether its daemon lives, or may live: one that we may not look into is not ours to judge.
        nbytes: Memory that it takes.
        sealed: Slots whose saves its next daemon may still finish.
        waiting: Whether trainers live that wait for its next daemon.
    """

    path: str
    uid: int
    runtime: str
    live: bool
    nbytes: int
    sealed: int
    waiting: bool


def arena_directories(shm_dir: str) -> list[ArenaDirectory]:
    """Return the directories of daemons, live and dead. Raises SystemCallFailed."""
    names = [name for name in sorted(_listed(shm_dir)) if _ROOT.fullmatch(name)]
    runtimes = {name_for(runtime): runtime for runtime in _likely_runtimes(names)}
    return [_look_into(os.path.join(shm_dir, name), runtimes.get(name.rpartition("-")[2], "")) for name in names]


def _listed(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError as error:
        raise SystemCallFailed("readdir", directory, error.errno or 0) from None


def _likely_runtimes(names: list[str]) -> Iterator[str]:
    """Yield where daemons may have their sockets: the usual places, and what running ones were told."""
    yield runtime_dir()
    yield "/run/ckptd"
    for name in names:
        uid = name.split("-")[1]
        yield f"/run/user/{uid}/ckptd"
        yield f"/tmp/ckptd-{uid}"
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as command, open(f"/proc/{pid}/environ", "rb") as environment:
                words = environment.read().split(b"\0") if b"ckptd.daemon" in command.read() else []
        except OSError:
            continue  # gone, or another user's
        yield from (os.fsdecode(word[18:]) for word in words if word.startswith(b"CKPTD_RUNTIME_DIR="))


def _look_into(path: str, runtime: str) -> ArenaDirectory:
    live = not _unlocked(path)
    arenas = [] if live else [_look_at_arena(file) for file in _files(path) if file.endswith(".arena")]
    sealed, waiting = sum(number for number, _ in arenas), any(held for _, held in arenas)
    uid = int(os.path.basename(path).split("-")[1])
    return ArenaDirectory(path, uid, runtime, live, tree_bytes(path), sealed, waiting)


def _unlocked(path: str) -> bool:
    """Say whether nobody holds a directory's lock; False where we cannot tell."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _look_at_arena(path: str) -> tuple[int, bool]:
    """Return how many slots of an arena are sealed, and whether a live trainer holds it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return 0, False
    try:
        states = [read_slot(descriptor, slot)[0] for slot in range(count_slots(descriptor))]
        held = is_held(descriptor)
    finally:
        os.close(descriptor)
    return sum(state in (SlotState.SEALED, SlotState.PERSISTING) for state in states), held


def remove_arenas(path: str) -> str:
    """Remove a dead daemon's directory, and return why it is still there, or ""."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return ""
    except OSError as error:
        return error.strerror or "cannot be opened"
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held to the end: no daemon adopts what is going
        shutil.rmtree(path)
    except BlockingIOError:
        return "a daemon has taken it in the meantime"
    except OSError as error:
        return f"{error.filename or path}: {error.strerror}"
    finally:
        os.close(descriptor)
    return ""


# --- hidden directories ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HiddenSave:
    """A save's hidden directory.

    Attributes:
        path: Where it is.
        checkpoint_id: Which checkpoint it was to become.
        save_id: Which save's it is.
        uid: Whose it is.
        nbytes: Room that it takes.
        changed_unix_s: When something in it last changed, by the file system's clock.
    """

    path: str
    checkpoint_id: str
    save_id: str
    uid: int
    nbytes: int
    changed_unix_s: float

    @property
    def removing(self) -> bool:
        """Whether it is no save, but a checkpoint whose removal has begun."""
        return is_removed(os.path.basename(self.path))


def hidden_saves(folder: str) -> Iterator[HiddenSave]:
    """Yield the hidden directories of saves below a folder. Raises SystemCallFailed if the folder cannot be read."""
    top = os.path.abspath(folder)
    waiting = [top]
    while waiting:
        at = waiting.pop()
        try:
            with os.scandir(at) as entries:
                below = sorted((e for e in entries if e.is_dir(follow_symlinks=False)), key=lambda e: e.name)
        except OSError as error:
            if at == top:
                raise SystemCallFailed("open", folder, error.errno or 0) from None
            continue  # another user's, or gone: none of ours
        for entry in below:
            parts = split_hidden(entry.path)
            if parts is None:
                waiting.append(entry.path)
            else:
                changed = max(map(_changed_unix_s, [entry.path, *_files(entry.path)]))
                uid = entry.stat(follow_symlinks=False).st_uid
                yield HiddenSave(entry.path, *parts[:2], uid, tree_bytes(entry.path), changed)


def reason_to_keep(save: HiddenSave, *, busy: Collection[str], now_unix_s: float, older_than_s: float) -> str:
    """Return why a hidden directory stays, or "" if it is a leftover.

    Args:
        save: The directory.
        busy: Checkpoint ids that live daemons are saving.
        now_unix_s: The time, by the file system's clock.
        older_than_s: What changed later may be the work of a daemon of another node.
    """
    from ckptd.checkpoint.publishing.leftovers import Fate, foresee

    if save.checkpoint_id in busy:
        return "a daemon is working on it"
    age_s = now_unix_s - save.changed_unix_s
    if age_s < older_than_s:
        return f"changed {max(age_s, 0):.0f} s ago, which is less than --older-than"
    if not _unlocked(save.path):
        return "another process has locked it, or it is not ours"
    if save.removing:
        return ""
    try:
        fate = foresee(save.path)
    except CkptdError as error:
        return str(error)
    return "it may hold the last copy of something; look into it yourself" if fate is Fate.KEEP else ""


def settle(save: HiddenSave) -> str:
    """Remove a leftover, or give it its name back where it is the last copy of a checkpoint.

    Returns:
        Why it is still there, or "".
    """
    from ckptd.checkpoint.publishing.commit import discard
    from ckptd.checkpoint.publishing.leftovers import sweep

    if not os.path.lexists(save.path):
        return ""
    try:
        if save.removing:
            discard(save.path)
            return ""
        return sweep(save.path, {save.save_id}).kept.get(save.path, "")
    except CkptdError as error:
        return str(error)


def names_back(save: HiddenSave) -> bool:
    """Say whether a leftover will get its name back."""
    from ckptd.checkpoint.publishing.leftovers import Fate, foresee

    return not save.removing and foresee(save.path) is Fate.NAME_BACK


def tree_bytes(path: str) -> int:
    """Return the room that the files of a directory take."""
    return sum(map(_blocks, _files(path))) * _BLOCK_BYTES


def _files(path: str) -> Iterator[str]:
    for folder, _, names in os.walk(path):
        yield from map(partial(os.path.join, folder), sorted(names))


def _blocks(path: str) -> int:
    try:
        return os.lstat(path).st_blocks
    except OSError:
        return 0  # just gone


def _changed_unix_s(path: str) -> float:
    try:
        return os.lstat(path).st_mtime
    except OSError:
        return 0.0
