"""Removes checkpoints: first the name, in one step, then the files.

Invariant: under a visible name a reader finds a whole checkpoint or nothing. What a killed removal leaves behind has a
hidden name and is removed by the next one.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from functools import partial
from typing import Any

from ckptd.checkpoint.folder.catalog import CatalogEntry, list_entries, look_at
from ckptd.checkpoint.folder.locks import lock_for_removal
from ckptd.checkpoint.folder.retention import choose_removals
from ckptd.checkpoint.names import is_removed, removed_directory, unfinished_save
from ckptd.checkpoint.system import named, sync_directory
from ckptd.protocol.errors import CkptdError
from ckptd.protocol.retention_messages import RetainDone, RetainTask


def retain(task: RetainTask) -> RetainDone:
    """Remove from a folder what its policy does not keep, and what killed removals have left behind.

    Raises:
        SystemCallFailed: The folder cannot be read. What cannot be removed is told in the answer instead.
    """
    names = named("scandir", task.root, lambda: os.listdir(task.root))
    errors: list[str] = []
    for name in filter(is_removed, names):
        _remove_files(os.path.join(task.root, name), errors)
    saving = [found for name in names if (found := unfinished_save(name)) is not None]
    chosen = choose_removals(list_entries(task.root), task.keep, busy=[*task.busy, *saving])
    removed: list[str] = []
    held: list[str] = []
    for entry in chosen:
        try:
            (removed if _remove(entry, errors) else held).append(entry.name)
        except CkptdError as error:
            errors.append(str(error))
    return RetainDone(removed, held, errors)


def _remove(entry: CatalogEntry, errors: list[str]) -> bool:
    """Remove a checkpoint, unless somebody reads it or it has changed meanwhile; return whether it went."""
    descriptor = lock_for_removal(entry.path)
    if descriptor is None:
        return False
    try:
        # With the lock held nobody can begin to read or pin it. A save may have replaced it just before.
        if look_at(entry.path) != entry:
            return False
        hidden = removed_directory(entry.path, secrets.token_hex(4))
        named("rename", entry.path, partial(os.rename, entry.path, hidden))
        sync_directory(os.path.dirname(entry.path))
    finally:
        os.close(descriptor)
    _remove_files(hidden, errors)
    return True


def _remove_files(hidden: str, errors: list[str]) -> None:
    """Remove a hidden directory; others may be at it, too."""

    def note(_: Any, path: str, failure: tuple[Any, BaseException, Any]) -> None:
        error = failure[1]
        # Another one's file may be gone before we come to it, or its directory not be empty yet.
        if isinstance(error, OSError) and error.errno not in {errno.ENOENT, errno.ENOTEMPTY}:
            errors.append(f"{path}: {error.strerror}")

    shutil.rmtree(hidden, onerror=note)
