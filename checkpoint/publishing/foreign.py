"""What users put beside a checkpoint, in its own directory: kept when the checkpoint is replaced.

Before the exchange of names everything foreign is linked into the new directory, so that no moment is without it; after
it, what was made or replaced in between is moved over. Nothing of the user's is deleted.
"""

from __future__ import annotations

import errno
import os
import shutil
from functools import partial

from ckptd.checkpoint.names import is_checkpoint_file
from ckptd.checkpoint.system import closed_at_end, named, sync_directory


def link_foreign(old: str, new: str) -> None:
    """Link what is foreign in ``old`` into ``new``, durably. Raises SystemCallFailed."""
    for entry in sorted(named("readdir", old, partial(os.listdir, old))):
        target = os.path.join(new, entry)
        if not is_checkpoint_file(entry) and not os.path.lexists(target):
            _link_entry(os.path.join(old, entry), target)
    sync_directory(new)


def _link_entry(source: str, target: str) -> None:
    if not _is_folder(source):
        named("link", target, partial(_link, source, target))
        return
    named("mkdir", target, partial(os.mkdir, target))
    for entry in sorted(named("readdir", source, partial(os.listdir, source))):
        _link_entry(os.path.join(source, entry), os.path.join(target, entry))
    named("chmod", target, partial(shutil.copystat, source, target))
    sync_directory(target)


def move_late_foreign(old: str, new: str) -> None:
    """Move from ``old`` to ``new`` what was made or replaced there after :func:`link_foreign` had looked."""
    for entry in sorted(named("readdir", old, partial(os.listdir, old))):
        if not is_checkpoint_file(entry):
            _move_late(os.path.join(old, entry), os.path.join(new, entry))


def _move_late(source: str, target: str) -> None:
    if not os.path.lexists(target):
        _rename(source, target)
    elif _is_folder(source) and _is_folder(target):
        for entry in sorted(os.listdir(source)):
            _move_late(os.path.join(source, entry), os.path.join(target, entry))
    elif not _is_folder(source) and not _is_folder(target) and _newer(source, target):
        _rename(source, target)


def _rename(source: str, target: str) -> None:
    """Move an entry for good: what it is taken from will be removed."""
    named("rename", target, partial(os.replace, source, target))
    sync_directory(os.path.dirname(target))


def _newer(source: str, target: str) -> bool:
    """Return whether a file was replaced by another after it was linked or copied."""
    one, other = os.lstat(source), os.lstat(target)
    return one.st_ino != other.st_ino and one.st_mtime_ns > other.st_mtime_ns


def _is_folder(path: str) -> bool:
    return os.path.isdir(path) and not os.path.islink(path)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except FileNotFoundError:
        if os.path.lexists(source):
            raise
        # its user has removed it while we looked
    except OSError as error:
        if error.errno not in {errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK}:
            raise
        _copy(source, target)  # a file system without hard links


def _copy(source: str, target: str) -> None:
    shutil.copy2(source, target, follow_symlinks=False)
    if not os.path.islink(target):
        descriptor = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
        with closed_at_end(descriptor, target):
            os.fsync(descriptor)
