"""Publishes a checkpoint: index and metadata last, everything fsynced, then one rename.

Invariant: under a checkpoint id a reader finds the old checkpoint or the new one, whole. A published directory is never
written into: an existing one is exchanged by name.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Final

import numpy as np
from safetensors import SafetensorError, safe_open
from xxhash import xxh3_64_intdigest

from ckptd.checkpoint.image.frame import METADATA_HASH, frame_header
from ckptd.checkpoint.indexing.index import Index, encode_index
from ckptd.checkpoint.names import INDEX_NAME, METADATA_NAME, set_aside
from ckptd.checkpoint.planning.planfile import StoredPlan
from ckptd.checkpoint.publishing.foreign import link_foreign, move_late_foreign
from ckptd.checkpoint.stock.metadata_pickle import encode_metadata
from ckptd.checkpoint.system import named, rename_exchange, rename_new, sync_directory, write_file
from ckptd.protocol.crash_points import CrashPoint, reach
from ckptd.protocol.errors import CheckpointExists, SystemCallFailed, TruncatedFile
from ckptd.protocol.messages import CommitTask

logger = logging.getLogger(__name__)


# Folders above checkpoints, by device and inode, whose names this process knows to be durable.
_durable: set[tuple[int, int]] = set()
# A folder above that we may enter but not read, or not sync, is none that a save of ours has made.
_NOT_OURS: Final = {errno.EACCES, errno.EPERM, errno.EROFS}


def prepare_directory(directory: str) -> None:
    """Make the hidden directory of a save, and the folders above it. Every rank's writer may be the first.

    The names of the folders above it are made durable: a checkpoint must not be lost with its parent. That goes for
    those too that are there: who made them may have died before the sync.

    Raises:
        SystemCallFailed: It cannot be made, or not be made durable.
    """
    new_folders: list[str] = []
    parent = folder = os.path.dirname(directory)
    while not os.path.lexists(folder):
        new_folders.append(folder)
        folder = os.path.dirname(folder)
    named("mkdir", parent, lambda: os.makedirs(parent, exist_ok=True))
    for new in new_folders:
        sync_directory(os.path.dirname(new))
    named("stat", folder, lambda: _sync_names_above(os.path.realpath(folder)))
    _durable.update(named("stat", parent, lambda: [_identity(new) for new in new_folders]))
    named("mkdir", directory, lambda: os.makedirs(directory, exist_ok=True))


def _sync_names_above(folder: str) -> None:
    """Make the name of a folder and of all above it durable, up to the root of their file system, once per process."""
    seen = []
    while (key := _identity(folder)) not in _durable:
        seen.append(key)
        parent = os.path.dirname(folder)
        if parent == folder or _identity(parent)[0] != key[0]:
            break
        try:
            sync_directory(parent)
        except SystemCallFailed as error:
            if error.errno not in _NOT_OURS:
                raise
        folder = parent
    _durable.update(seen)


def _identity(folder: str) -> tuple[int, int]:
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def discard(directory: str) -> None:
    """Remove a directory and what is in it; that it is gone already is no error.

    Its metadata and index go first: what is removed in part can no longer be taken for a checkpoint. What fails is
    tried once more, for gigabytes must not be left lying for one interrupted call.

    Raises:
        SystemCallFailed: Something of it is still there.
    """
    try:
        _remove(directory)
    except OSError:
        try:
            _remove(directory)
        except OSError as error:
            raise SystemCallFailed("unlink", error.filename or directory, error.errno or errno.EIO) from None


def _remove(directory: str) -> None:
    try:
        if os.path.isdir(directory) and not os.path.islink(directory):
            for name in (METADATA_NAME, INDEX_NAME):
                with suppress(FileNotFoundError):
                    os.unlink(os.path.join(directory, name))
        shutil.rmtree(directory)
    except NotADirectoryError:
        return
    except FileNotFoundError:
        if os.path.lexists(directory):
            raise  # somebody else removes it, too


def complete_index(plan: StoredPlan, task: CommitTask) -> Index:
    """Return the plan's index with the reported hashes and the objects' true lengths put in."""
    index = plan.index
    hashes = np.zeros(len(index.item_name), np.uint64)
    data_bytes, record_bytes = index.data_bytes.copy(), index.record_bytes.copy()
    for rows, reported, lengths in zip(plan.ranks, task.hashes, task.object_bytes, strict=True):
        kept = rows.index_rows >= 0
        hashes[rows.index_rows[kept]] = np.frombuffer(reported, dtype="<u8")[kept]
        objects = kept & rows.is_object
        true_bytes = rows.true_bytes(lengths)[objects]
        data_bytes[rows.index_rows[objects]] = true_bytes
        record_bytes[rows.index_rows[objects]] = true_bytes
    return dataclasses.replace(index, item_hash=hashes, data_bytes=data_bytes, record_bytes=record_bytes)


def _with_header(index: Index, task: CommitTask, metadata: bytes) -> Index:
    header = {**task.header, **frame_header(task.frame_hashes), METADATA_HASH: f"{xxh3_64_intdigest(metadata):016x}"}
    return dataclasses.replace(index, header=header)


def commit(plan: StoredPlan, task: CommitTask) -> int:
    """Write the index and the stock metadata, and publish the directory.

    Returns:
        Size of the checkpoint in bytes.

    Raises:
        CheckpointExists: The id has a checkpoint that must not be overwritten.
        SystemCallFailed: A call failed; the id still shows what it showed before.
        TruncatedFile: An image is shorter than its rank reported; the same.
    """
    index = complete_index(plan, task)
    metadata = encode_metadata(index, checkpoint_id=task.checkpoint_id, save_id=task.save_id)
    encoded = encode_index(_with_header(index, task, metadata))
    # A worker before us may have died after the rename: what has the hidden name is then the old checkpoint.
    if save_id_of(task.checkpoint_id) != task.save_id:
        nbytes = _images_bytes(task.directory, index)
        write_file(os.path.join(task.directory, INDEX_NAME), encoded)
        reach(CrashPoint.WORKER_INDEX_WRITTEN)
        write_file(os.path.join(task.directory, METADATA_NAME), metadata)
        reach(CrashPoint.WORKER_METADATA_WRITTEN)
        sync_directory(task.directory)
        reach(CrashPoint.WORKER_DIRECTORY_SYNCED)
        publish(task.directory, task.checkpoint_id, overwrite=task.overwrite)
    else:
        nbytes = _images_bytes(task.checkpoint_id, index)
        sync_directory(os.path.dirname(task.checkpoint_id))
    try:
        clear_away(task.directory, task.checkpoint_id)
    except SystemCallFailed as error:  # the save is done: this costs room, not the checkpoint
        logger.warning("could not remove the checkpoint that was replaced: %s", error)
    reach(CrashPoint.WORKER_CLEARED)
    return nbytes + len(encoded) + len(metadata)


def _images_bytes(directory: str, index: Index) -> int:
    """Return the size of all images, once more: since its rank's report somebody may have removed one."""
    total = 0
    for name, end in zip(index.files, index.file_ends().tolist(), strict=True):
        path = os.path.join(directory, name)
        found = named("stat", path, partial(os.stat, path)).st_size
        if found < end:
            raise TruncatedFile(path, end, found)
        total += found
    return total


def publish(directory: str, checkpoint_id: str, *, overwrite: bool) -> None:
    """Give a complete, durable directory its name, in one step; see the module's invariant.

    Args:
        directory: Where it lies, beside its name.
        checkpoint_id: The name.
        overwrite: Whether a checkpoint that has the name is replaced; a directory without one always is.

    Raises:
        CheckpointExists: There is one, and it must not be overwritten.
        SystemCallFailed: A call failed; the id shows what it showed before.
    """
    undo = _give_name(directory, checkpoint_id, overwrite=overwrite)
    reach(CrashPoint.WORKER_NAMED)
    try:
        sync_directory(os.path.dirname(checkpoint_id))
        reach(CrashPoint.WORKER_PARENT_SYNCED)
    except SystemCallFailed:
        _take_back(undo)  # the new name is not durable, so the save fails
        raise


def _take_back(undo: Callable[[], object]) -> None:
    try:
        undo()
    except (OSError, SystemCallFailed) as error:  # the id shows the new checkpoint, whole, or nothing for the moment
        logger.warning("could not take a checkpoint's new name back: %s", error)


def _give_name(directory: str, checkpoint_id: str, *, overwrite: bool) -> Callable[[], object]:
    """Make the rename, and return what would take it back."""
    try:
        if rename_new(directory, checkpoint_id):
            return partial(rename_new, checkpoint_id, directory)
    except SystemCallFailed as error:
        if error.errno != errno.EEXIST:
            raise
    if not os.path.lexists(checkpoint_id):
        named("rename", checkpoint_id, lambda: os.rename(directory, checkpoint_id))
        return partial(os.rename, checkpoint_id, directory)
    if not os.path.isdir(checkpoint_id) or os.path.islink(checkpoint_id):
        raise SystemCallFailed("rename", checkpoint_id, errno.ENOTDIR)
    if not overwrite and has_checkpoint(checkpoint_id):
        raise CheckpointExists(checkpoint_id)
    link_foreign(checkpoint_id, directory)
    old, undo = _replace(directory, checkpoint_id)
    if not overwrite and has_checkpoint(old):
        _take_back(undo)  # somebody published between the look and the exchange: they were first
        raise CheckpointExists(checkpoint_id)
    return undo


def _replace(directory: str, checkpoint_id: str) -> tuple[str, Callable[[], object]]:
    """Give a directory the name that another has; return where that one is then, and what would take it back."""
    if rename_exchange(directory, checkpoint_id):
        return directory, partial(rename_exchange, directory, checkpoint_id)
    old = set_aside(directory)
    named("rename", checkpoint_id, lambda: os.rename(checkpoint_id, old))

    def undo() -> None:
        if os.path.lexists(checkpoint_id):
            os.rename(checkpoint_id, directory)
        os.rename(old, checkpoint_id)

    try:
        named("rename", checkpoint_id, lambda: os.rename(directory, checkpoint_id))
    except SystemCallFailed:
        _take_back(undo)
        raise
    return old, undo


def has_checkpoint(path: str) -> bool:
    """Return whether a directory holds a checkpoint."""
    return os.path.lexists(os.path.join(path, METADATA_NAME))


def save_id_of(checkpoint_id: str) -> str | None:
    """Return the name of the save that is published under an id, or None if it is none of ours."""
    path = os.path.join(checkpoint_id, INDEX_NAME)
    if not os.path.isfile(path):
        return None  # and a pipe would keep us waiting
    try:
        with safe_open(path, framework="numpy") as index:
            header = json.loads((index.metadata() or {}).get("header", "{}"))
    except (OSError, ValueError, RecursionError, SafetensorError):
        return None
    return header.get("save_id") if isinstance(header, dict) else None


def clear_away(directory: str, checkpoint_id: str) -> None:
    """Remove the old checkpoint, which got the hidden name in exchange, or ``.old`` where names cannot be exchanged."""
    for old in (directory, set_aside(directory)):
        if os.path.isdir(old):
            remove_replaced(old, checkpoint_id)


def remove_replaced(old: str, checkpoint_id: str) -> None:
    """Remove what stood under an id, once its user's late files have gone over. Raises SystemCallFailed."""
    move_late_foreign(old, checkpoint_id)
    discard(old)
