"""What dead daemons and killed saves leave behind, and what of it may go.

Invariant: nothing is judged a leftover that a live daemon works on or a trainer waits for, that somebody locks, or that
may be the only copy of a checkpoint. A daemon's directory on tmpfs is locked as long as it lives: see
:mod:`ckptd.daemon.directories`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Final

from ckptd.checkpoint.names import METADATA_NAME, is_checkpoint_file, parse_hidden
from ckptd.protocol.errors import SystemCallFailed
from ckptd.staging.arena import SlotState, count_slots, is_held, read_slot

_RUNTIME: Final = "runtime"
_ROOT: Final = re.compile(r"ckptd-(\d+)-[0-9a-f]{12}")
_BLOCK_BYTES: Final = 512  # of st_blocks, on every file system: stat(2)


def mark(root: str, runtime: str) -> None:
    """Let a daemon's directory on tmpfs, which it holds locked, name its runtime directory, where it can be asked.

    Raises:
        SystemCallFailed: The directory cannot be written.
    """
    try:
        with open(os.path.join(root, _RUNTIME), "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(runtime)
    except OSError as error:
        raise SystemCallFailed("write", root, error.errno or 0) from None


@dataclass(frozen=True)
class ArenaDirectory:
    """A daemon's directory on tmpfs.

    Attributes:
        path: Where it is.
        runtime: Runtime directory of its daemon, or "" if that is not known.
        live: Whether its daemon lives, or may live: one that we may not look into, or that no daemon has marked, is not
            ours to judge.
        nbytes: Memory that it takes.
        sealed: Slots whose saves its next daemon may still finish.
        waiting: Whether trainers live that wait for its next daemon.
    """

    path: str
    runtime: str
    live: bool
    nbytes: int
    sealed: int
    waiting: bool


def arena_directories(shm_dir: str) -> list[ArenaDirectory]:
    """Return the directories of daemons, live and dead. Raises SystemCallFailed."""
    try:
        names = sorted(os.listdir(shm_dir))
    except OSError as error:
        raise SystemCallFailed("listdir", shm_dir, error.errno or 0) from None
    return [_look_into(os.path.join(shm_dir, name)) for name in names if _ROOT.fullmatch(name)]


def _look_into(path: str) -> ArenaDirectory:
    runtime = ""
    with (
        contextlib.suppress(OSError),
        open(os.path.join(path, _RUNTIME), encoding="utf-8", errors="surrogateescape") as file,
    ):
        runtime = file.read()
    live = not (runtime and _unlocked(path))
    arenas = [] if live else [_look_at_arena(file) for file in _files(path) if file.endswith(".arena")]
    sealed, waiting = sum(number for number, _ in arenas), any(held for _, held in arenas)
    return ArenaDirectory(path, runtime, live, tree_bytes(path), sealed, waiting)


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


@dataclass(frozen=True)
class HiddenSave:
    """A save's hidden directory.

    Attributes:
        path: Where it is.
        checkpoint_id: Which checkpoint it was to become.
        nbytes: Room that it takes.
        changed_unix_s: When something in it last changed, by the file system's clock.
        whole: Whether it holds a whole checkpoint: the one that was replaced, or one that was about to get its name.
        foreign: A file in it that belongs to no checkpoint, or "".
    """

    path: str
    checkpoint_id: str
    nbytes: int
    changed_unix_s: float
    whole: bool
    foreign: str


def hidden_saves(folder: str) -> Iterator[HiddenSave]:
    """Yield the hidden directories of saves below a folder. Raises SystemCallFailed if the folder cannot be read."""
    waiting = [os.path.abspath(folder)]
    while waiting:
        at = waiting.pop()
        try:
            with os.scandir(at) as entries:
                below = sorted((e for e in entries if e.is_dir(follow_symlinks=False)), key=lambda e: e.name)
        except OSError as error:
            if at == os.path.abspath(folder):
                raise SystemCallFailed("open", folder, error.errno or 0) from None
            continue  # another user's, or gone: none of ours
        for entry in below:
            parsed = parse_hidden(entry.name)
            if parsed is None:
                waiting.append(entry.path)
            else:
                yield _hidden_save(entry.path, os.path.join(at, parsed[0]))


def _hidden_save(path: str, checkpoint_id: str) -> HiddenSave:
    changed, foreign = _changed_unix_s(path), ""
    for file in _files(path):
        changed = max(changed, _changed_unix_s(file))
        if not foreign and _is_foreign(file):
            foreign = file
    whole = os.path.lexists(os.path.join(path, METADATA_NAME))
    return HiddenSave(path, checkpoint_id, tree_bytes(path), changed, whole, foreign)


def _is_foreign(file: str) -> bool:
    """Say whether a file is its user's, and here alone: what an older checkpoint shares with us has two names."""
    name = os.path.basename(file)
    try:
        return not (is_checkpoint_file(name) or name.endswith(".safetensors")) and os.lstat(file).st_nlink == 1
    except OSError:
        return False  # just gone


def reason_to_keep(save: HiddenSave, *, busy: Collection[str], now_unix_s: float, older_than_s: float) -> str:
    """Return why a hidden directory stays, or "" if it is a leftover.

    Args:
        save: The directory.
        busy: Checkpoint ids that live daemons are saving.
        now_unix_s: The time, by the file system's clock.
        older_than_s: What changed later may be the work of a daemon of another node.
    """
    if save.checkpoint_id in busy:
        return "a daemon is working on it"
    age_s = now_unix_s - save.changed_unix_s
    if age_s < older_than_s:
        return f"changed {max(age_s, 0):.0f} s ago, which is less than --older-than"
    if save.whole and not os.path.lexists(save.checkpoint_id):
        return f"holds a whole checkpoint, and {save.checkpoint_id} is not there: rename it, or delete it yourself"
    if save.foreign:
        return f"holds a file that is no checkpoint's, {os.path.basename(save.foreign)}: move it away first"
    if not _unlocked(save.path):
        return "another process has locked it"
    return ""


def remove_hidden(path: str) -> bool:
    """Remove a leftover hidden directory; False if it is gone already, perhaps to become a checkpoint.

    Raises:
        SystemCallFailed: It cannot be removed.
    """
    # Whoever was about to publish it after all finds nothing under its name, rather than half of it.
    aside = path if path.endswith(".gc") else f"{path}.gc"
    try:
        os.rename(path, aside)
        shutil.rmtree(aside)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise SystemCallFailed("unlink", error.filename or path, error.errno or 0) from None
    return True


def remove_arenas(path: str) -> bool:
    """Remove a dead daemon's directory; False if a daemon has taken it in the meantime. Raises SystemCallFailed."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except OSError as error:
        raise SystemCallFailed("open", path, error.errno or 0) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held to the end: no daemon adopts what is going
    except OSError:
        return False
    else:
        try:
            shutil.rmtree(path)
        except OSError as error:
            raise SystemCallFailed("unlink", error.filename or path, error.errno or 0) from None
        return True
    finally:
        os.close(descriptor)


def tree_bytes(path: str) -> int:
    """Return the room that the files of a directory take."""
    return sum(_blocks(file) for file in _files(path)) * _BLOCK_BYTES


def _files(path: str) -> Iterator[str]:
    for folder, _, names in os.walk(path):
        yield from (os.path.join(folder, name) for name in sorted(names))


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
