"""Publishes a checkpoint: index and metadata last, everything fsynced, then one rename.

Invariant: under a checkpoint id a reader finds the old checkpoint or the new one, whole. A published directory is never
written into: an existing one is exchanged by name.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable
from functools import partial

import numpy as np
from safetensors import SafetensorError, safe_open
from xxhash import xxh3_64_intdigest

from ckptd.checkpoint.foreign import link_foreign, move_late_foreign
from ckptd.checkpoint.frame import METADATA_HASH, frame_header
from ckptd.checkpoint.index import Index, encode_index
from ckptd.checkpoint.metadata_pickle import encode_metadata
from ckptd.checkpoint.names import INDEX_NAME, METADATA_NAME
from ckptd.checkpoint.planfile import StoredPlan
from ckptd.checkpoint.system import named, rename_exchange, rename_new, sync_directory, write_file
from ckptd.protocol.crash_points import CrashPoint, reach
from ckptd.protocol.errors import SystemCallFailed
from ckptd.protocol.messages import CommitTask


def prepare_directory(directory: str) -> None:
    """Make the hidden directory of a save, and the folders above it. Every rank's writer may be the first.

    The names of new folders above it are made durable: a checkpoint must not be lost with its parent.
    """
    new_folders: list[str] = []
    folder = os.path.dirname(directory)
    while not os.path.lexists(folder):
        new_folders.append(folder)
        folder = os.path.dirname(folder)
    named("mkdir", directory, lambda: os.makedirs(directory, exist_ok=True))
    for new in new_folders:
        sync_directory(os.path.dirname(new))


def discard_save(directory: str) -> None:
    """Remove what a failed save has written, unless an old checkpoint has got its hidden name in exchange.

    A commit that was killed between its rename and its answer is told to have failed; the old checkpoint stays then,
    under the hidden name, rather than being deleted on a guess.
    """
    if os.path.exists(os.path.join(directory, METADATA_NAME)):
        save_id = _save_id_of(directory)
        if save_id is None or not directory.endswith(save_id):
            return
    discard(directory)
    reach(CrashPoint.WORKER_DISCARDED)


def discard(directory: str) -> None:
    """Remove a directory and what is in it; that it is gone already is no error."""
    try:
        shutil.rmtree(directory)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise SystemCallFailed("unlink", error.filename or directory, error.errno or errno.EIO) from None


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
        SystemCallFailed: A call failed; the id still shows what it showed before.
    """
    index = complete_index(plan, task)
    metadata = encode_metadata(index, checkpoint_id=task.checkpoint_id, save_id=task.save_id)
    encoded = encode_index(_with_header(index, task, metadata))
    # A worker before us may have died after the rename: what has the hidden name is then the old checkpoint.
    if _save_id_of(task.checkpoint_id) != task.save_id:
        write_file(os.path.join(task.directory, INDEX_NAME), encoded)
        reach(CrashPoint.WORKER_INDEX_WRITTEN)
        write_file(os.path.join(task.directory, METADATA_NAME), metadata)
        reach(CrashPoint.WORKER_METADATA_WRITTEN)
        sync_directory(task.directory)
        reach(CrashPoint.WORKER_DIRECTORY_SYNCED)
        publish(task.directory, task.checkpoint_id, overwrite=task.overwrite)
    else:
        sync_directory(os.path.dirname(task.checkpoint_id))
    clear_away(task.directory, task.checkpoint_id)
    reach(CrashPoint.WORKER_CLEARED)
    images = sum(os.stat(os.path.join(task.checkpoint_id, name)).st_size for name in set(index.files))
    return images + len(encoded) + len(metadata)


def publish(directory: str, checkpoint_id: str, *, overwrite: bool) -> None:
    """Give a complete, durable directory its name, in one step; see the module's invariant."""
    parent = os.path.dirname(checkpoint_id)
    undo = _give_name(directory, checkpoint_id, overwrite=overwrite)
    reach(CrashPoint.WORKER_NAMED)
    try:
        sync_directory(parent)
        reach(CrashPoint.WORKER_PARENT_SYNCED)
    except SystemCallFailed:
        undo()  # the new name is not durable, so the save fails, and the id shows what it showed before
        raise


def _give_name(directory: str, checkpoint_id: str, *, overwrite: bool) -> Callable[[], object]:
    """Make the rename, and return what would take it back."""
    try:
        if rename_new(directory, checkpoint_id):
            return partial(rename_new, checkpoint_id, directory)
    except SystemCallFailed as error:
        if error.errno != errno.EEXIST or not overwrite:
            raise
    return _replace(directory, checkpoint_id, overwrite=overwrite)


def _replace(directory: str, checkpoint_id: str, *, overwrite: bool) -> Callable[[], object]:
    exists = os.path.lexists(checkpoint_id)
    if exists and not overwrite:
        raise SystemCallFailed("rename", checkpoint_id, errno.EEXIST)
    if not exists:
        named("rename", checkpoint_id, lambda: os.rename(directory, checkpoint_id))
        return partial(os.rename, checkpoint_id, directory)
    if not os.path.isdir(checkpoint_id) or os.path.islink(checkpoint_id):
        raise SystemCallFailed("rename", checkpoint_id, errno.ENOTDIR)
    link_foreign(checkpoint_id, directory)
    if rename_exchange(directory, checkpoint_id):
        return partial(rename_exchange, directory, checkpoint_id)
    old = f"{directory}.old"
    named("rename", checkpoint_id, lambda: os.rename(checkpoint_id, old))

    def undo() -> None:
        if os.path.lexists(checkpoint_id):
            os.rename(checkpoint_id, directory)
        os.rename(old, checkpoint_id)

    try:
        named("rename", checkpoint_id, lambda: os.rename(directory, checkpoint_id))
    except SystemCallFailed:
        undo()
        raise
    return undo


def _save_id_of(checkpoint_id: str) -> str | None:
    """Return the name of the save that is published under an id, or None if it is none of ours."""
    try:
        with safe_open(os.path.join(checkpoint_id, INDEX_NAME), framework="numpy") as index:
            header = json.loads((index.metadata() or {}).get("header", "{}"))
    except (OSError, ValueError, SafetensorError):
        return None
    return header.get("save_id") if isinstance(header, dict) else None


def clear_away(directory: str, checkpoint_id: str) -> None:
    """Remove the old checkpoint, which got the hidden name in exchange, or ``.old`` where names cannot be exchanged."""
    for old in (directory, f"{directory}.old"):
        if os.path.isdir(old):
            move_late_foreign(old, checkpoint_id)
            discard(old)
