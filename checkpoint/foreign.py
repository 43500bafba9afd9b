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
from ckptd.checkpoint.system import named, sync_directory


def link_foreign(old: str, new: str) -> None:
    """Link what is foreign in ``old`` into ``new``, durably. Raises SystemCallFailed."""
    for entry in sorted(os.listdir(old)):
        source, target = os.path.join(old, entry), os.path.join(new, entry)
        if is_checkpoint_file(entry) or os.path.lexists(target):
            continue
        if _is_folder(source):
            named("link", target, partial(shutil.copytree, source, target, symlinks=True, copy_function=_link))
            for folder, _, _ in os.walk(target):
                sync_directory(folder)
        else:
            named("link", target, partial(_link, source, target))
    sync_directory(new)


def move_late_foreign(old: str, new: str) -> None:
    """Move from ``old`` to ``new`` what was made or replaced there after :func:`link_foreign` had looked."""
    for entry in sorted(os.listdir(old)):
        if not is_checkpoint_file(entry):
            _move_late(os.path.join(old, entry), os.path.join(new, entry))


def _move_late(source: str, target: str) -> None:
    if not os.path.lexists(target):
        named("rename", target, partial(os.rename, source, target))
    elif _is_folder(source) and _is_folder(target):
        for entry in sorted(os.listdir(source)):
            _move_late(os.path.join(source, entry), os.path.join(target, entry))
    elif not _is_folder(source) and not _is_folder(target) and _newer(source, target):
        named("rename", target, partial(os.replace, source, target))


def _newer(source: str, target: str) -> bool:
    """Return whether a file was replaced by another after it was linked or copied."""
    one, other = os.lstat(source), os.lstat(target)
    return one.st_ino != other.st_ino and one.st_mtime_ns > other.st_mtime_ns


def _is_folder(path: str) -> bool:
    return os.path.isdir(path) and not os.path.islink(path)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in {errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK}:
            raise
        shutil.copy2(source, target, follow_symlinks=False)  # a file system without hard links
