"""What saves that failed or were killed have left beside their checkpoint ids, and what becomes of it.

Invariants: what may be the only copy of a checkpoint, or of a user's file, is never removed, and gets its name back
where nothing else has it; what a name on disk may still stand for is not removed before the names are durable.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Container
from dataclasses import dataclass, field
from enum import Enum
from functools import partial

from ckptd.checkpoint.indexing.open import read_index
from ckptd.checkpoint.names import METADATA_NAME, is_checkpoint_file, set_aside, split_hidden
from ckptd.checkpoint.publishing.commit import discard, remove_replaced, save_id_of
from ckptd.checkpoint.system import named, rename_new, sync_directory
from ckptd.protocol.crash_points import CrashPoint, reach
from ckptd.protocol.errors import BadMessage, CkptdError, SystemCallFailed


class Fate(Enum):
    """What becomes of a leftover."""

    REMOVE = "remove"  # a save that was never published, or the rest of a removal
    CLEAR_AWAY = "clear away"  # what a checkpoint that stands has replaced; its user's late files go over first
    NAME_BACK = "name back"  # what the id showed before, and nothing else shows it
    KEEP = "keep"


@dataclass(frozen=True)
class Leftover:
    """What is known of a hidden directory of a dead save.

    Attributes:
        own: Its index bears the name of the save: written by it and not published, or taken back.
        complete: A checkpoint: its index can be read and all its files have their full length.
        has_metadata: It holds ``.metadata``, whether or not that can be read. It is the first that a removal takes.
        foreign: Something in it belongs to a user.
        set_aside: It is the old checkpoint of a save where names cannot be exchanged in one step.
        id_exists: Something stands under the checkpoint id.
        id_complete: A checkpoint stands there.
    """

    own: bool
    complete: bool
    has_metadata: bool
    foreign: bool
    set_aside: bool
    id_exists: bool
    id_complete: bool

    @property
    def had_a_name(self) -> bool:
        """Whether it may have stood under the id: only what is complete, or was there before, ever does."""
        return self.own or self.has_metadata or self.foreign or self.set_aside


def fate_of(leftover: Leftover) -> Fate:
    """Decide; without I/O.

    Foreign files are linked into a hidden directory when its index is complete, so that they prove, in one which is
    not its save's own, that it once stood under the id.
    """
    if leftover.own and not leftover.set_aside:
        return Fate.REMOVE
    if not leftover.had_a_name:
        return Fate.REMOVE
    if leftover.id_exists:
        return Fate.CLEAR_AWAY if leftover.id_complete else Fate.KEEP
    whole_folder = leftover.set_aside and not leftover.has_metadata  # never a checkpoint, or not a readable one
    return Fate.NAME_BACK if leftover.complete or whole_folder else Fate.KEEP


@dataclass(frozen=True)
class Swept:
    """What a sweep has done, by path.

    Attributes:
        removed: These are gone.
        named_back: These are under their checkpoint ids again.
        kept: These are still there, and why.
    """

    removed: list[str] = field(default_factory=list)
    named_back: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)


def sweep(path: str, dead: Container[str]) -> Swept:
    """Settle what dead saves have left behind.

    Args:
        path: A hidden directory, or a directory in which some may lie.
        dead: Ids of saves on which nobody works any more, and nobody will; all others are left alone.

    Returns:
        What was done. Whatever cannot be removed is kept: it costs room, not a checkpoint.

    Raises:
        SystemCallFailed: The directory cannot be listed.
    """
    swept = Swept()
    for hidden in _with_set_aside(path) if split_hidden(path) else _hidden_in(path):
        _, save_id, _ = _parts(hidden)
        if save_id in dead and os.path.lexists(hidden):
            _sweep_one(hidden, swept)
    return swept


def foresee(hidden: str) -> Fate:
    """Return what a sweep would do with the hidden directory of a dead save.

    Raises:
        SystemCallFailed: It cannot be read, or is no directory.
    """
    return fate_of(_look_at(hidden))


def discard_save(directory: str) -> None:
    """Remove what a failed save has written.

    An old checkpoint that has got the hidden name in exchange stays, for a commit that was killed between its rename
    and its answer is told to have failed; unless nothing has its own name: then it is named back.

    Args:
        directory: The save's hidden directory.

    Raises:
        SystemCallFailed: Something could not be removed.
        BadMessage: It is not the name of a hidden directory.
    """
    if split_hidden(directory) is None:
        raise BadMessage(f"{directory}, which is no hidden directory of a save")
    for hidden in _with_set_aside(directory):
        if os.path.lexists(hidden):
            leftover = _look_at(hidden)
            if fate_of(leftover) is not Fate.CLEAR_AWAY:
                _settle(hidden, leftover)
    reach(CrashPoint.WORKER_DISCARDED)


def _with_set_aside(hidden: str) -> list[str]:
    """Return a hidden directory behind what its save has set aside, which gets its name back before it is judged."""
    _, _, is_set_aside = _parts(hidden)
    return [hidden] if is_set_aside else [set_aside(hidden), hidden]


def _hidden_in(directory: str) -> list[str]:
    """Return hidden directories; what was set aside comes before what would take its place."""
    names = named("readdir", directory, partial(os.listdir, directory))
    paths = [os.path.join(directory, name) for name in sorted(names, reverse=True)]
    return [path for path in paths if split_hidden(path)]


def _sweep_one(hidden: str, swept: Swept) -> None:
    try:
        fate = _settle(hidden, _look_at(hidden))
    except SystemCallFailed as error:
        swept.kept[hidden] = str(error)
        return
    if fate is Fate.NAME_BACK:
        swept.named_back.append(hidden)
    elif fate is Fate.KEEP:
        swept.kept[hidden] = "neither provably a dead save's nor a whole checkpoint"
    else:
        swept.removed.append(hidden)


def _settle(hidden: str, leftover: Leftover) -> Fate:
    checkpoint_id, _, _ = _parts(hidden)
    fate = fate_of(leftover)
    if fate is not Fate.KEEP and leftover.had_a_name:
        # A rename that was taken back, or one whose worker died before the sync: after a power failure the id may stand
        # for another directory than it does now. What is removed must be what no name can still mean.
        sync_directory(os.path.dirname(hidden))
    if fate is Fate.REMOVE:
        discard(hidden)
    elif fate is Fate.CLEAR_AWAY:
        remove_replaced(hidden, checkpoint_id)
    elif fate is Fate.NAME_BACK:
        _name_back(hidden, checkpoint_id)
    return fate


def _name_back(hidden: str, checkpoint_id: str) -> None:
    if not rename_new(hidden, checkpoint_id):
        if os.path.lexists(checkpoint_id):
            raise SystemCallFailed("rename", checkpoint_id, errno.EEXIST)
        named("rename", checkpoint_id, partial(os.rename, hidden, checkpoint_id))
    sync_directory(os.path.dirname(checkpoint_id))


def _look_at(hidden: str) -> Leftover:
    checkpoint_id, save_id, aside = _parts(hidden)
    if os.path.islink(hidden) or not os.path.isdir(hidden):
        raise SystemCallFailed("rmdir", hidden, errno.ENOTDIR)  # no save makes such a thing
    entries = named("readdir", hidden, partial(os.listdir, hidden))
    return Leftover(
        own=save_id_of(hidden) == save_id,
        complete=_is_complete(hidden),
        has_metadata=METADATA_NAME in entries,
        foreign=not all(map(is_checkpoint_file, entries)),
        set_aside=aside,
        id_exists=os.path.lexists(checkpoint_id),
        id_complete=_is_complete(checkpoint_id),
    )


def _parts(hidden: str) -> tuple[str, str, bool]:
    parts = split_hidden(hidden)
    assert parts is not None
    return parts


def _is_complete(directory: str) -> bool:
    """Return whether a directory holds a checkpoint whose files are all there, at full length."""
    try:
        index = read_index(directory)
    except CkptdError:
        return False
    try:
        sizes = [os.stat(os.path.join(directory, name)).st_size for name in index.files]
    except OSError:
        return False
    return all(size >= end for size, end in zip(sizes, index.file_ends().tolist(), strict=True))
