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

import numpy as np
from safetensors import SafetensorError, safe_open
from xxhash import xxh3_64_intdigest

from ckptd.checkpoint.frame import METADATA_HASH, frame_header
from ckptd.checkpoint.index import Index, encode_index
from ckptd.checkpoint.metadata_pickle import encode_metadata
from ckptd.checkpoint.names import INDEX_NAME, METADATA_NAME, is_checkpoint_file
from ckptd.checkpoint.planfile import StoredPlan
from ckptd.checkpoint.system import named, rename_exchange, rename_new, sync_directory, write_file
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


def discard(directory: str) -> None:
    """Remove a hidden directory and what is in it; that it is gone already is no error."""
    try:
        shutil.rmtree(directory)
    except FileNotFoundError:
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
        write_file(os.path.join(task.directory, METADATA_NAME), metadata)
        sync_directory(task.directory)
        publish(task.directory, task.checkpoint_id, overwrite=task.overwrite)
    else:
        sync_directory(os.path.dirname(task.checkpoint_id))
    _clear_away(task.directory, task.checkpoint_id)
    images = sum(os.stat(os.path.join(task.checkpoint_id, name)).st_size for name in set(index.files))
    return images + len(encoded) + len(metadata)


def publish(directory: str, checkpoint_id: str, *, overwrite: bool) -> None:
    """Give a complete, durable directory its name, in one step; see the module's invariant."""
    parent = os.path.dirname(checkpoint_id)
    try:
        if rename_new(directory, checkpoint_id):
            sync_directory(parent)
            return
    except SystemCallFailed as error:
        if error.errno != errno.EEXIST or not overwrite:
            raise
    _replace(directory, checkpoint_id, overwrite=overwrite)
    sync_directory(parent)


def _replace(directory: str, checkpoint_id: str, *, overwrite: bool) -> None:
    exists = os.path.lexists(checkpoint_id)
    if exists and not overwrite:
        raise SystemCallFailed("rename", checkpoint_id, errno.EEXIST)
    if not exists:
        named("rename", checkpoint_id, lambda: os.rename(directory, checkpoint_id))
        return
    if not os.path.isdir(checkpoint_id) or os.path.islink(checkpoint_id):
        raise SystemCallFailed("rename", checkpoint_id, errno.ENOTDIR)
    _keep_foreign(checkpoint_id, directory)
    if not rename_exchange(directory, checkpoint_id):
        old = f"{directory}.old"
        named("rename", checkpoint_id, lambda: os.rename(checkpoint_id, old))
        try:
            named("rename", checkpoint_id, lambda: os.rename(directory, checkpoint_id))
        except SystemCallFailed:
            os.rename(old, checkpoint_id)
            raise


def _save_id_of(checkpoint_id: str) -> str | None:
    """Return the name of the save that is published under an id, or None if it is none of ours."""
    try:
        with safe_open(os.path.join(checkpoint_id, INDEX_NAME), framework="numpy") as index:
            header = json.loads((index.metadata() or {}).get("header", "{}"))
    except (OSError, ValueError, SafetensorError):
        return None
    return header.get("save_id") if isinstance(header, dict) else None


def _clear_away(directory: str, checkpoint_id: str) -> None:
    """Remove the old checkpoint, which got the hidden name in exchange, or ``.old`` where names cannot be exchanged."""
    for old in (directory, f"{directory}.old"):
        if os.path.isdir(old):
            _move_late_foreign(old, checkpoint_id)
            discard(old)


def _keep_foreign(old: str, new: str) -> None:
    """Link what the user put beside the old checkpoint into the new one, so that no moment is without it."""
    for entry in sorted(os.listdir(old)):
        source, target = os.path.join(old, entry), os.path.join(new, entry)
        if is_checkpoint_file(entry) or os.path.lexists(target):
            continue
        if os.path.isdir(source) and not os.path.islink(source):
            named("mkdir", target, lambda source=source, target=target: _link_tree(source, target))  # type: ignore[misc]
        else:
            named("link", target, lambda source=source, target=target: _link(source, target))  # type: ignore[misc]
    sync_directory(new)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in {errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK}:
            raise
        shutil.copy2(source, target, follow_symlinks=False)  # a file system without hard links


def _link_tree(source: str, target: str) -> None:
    shutil.copytree(source, target, symlinks=True, copy_function=_link)


def _move_late_foreign(old: str, new: str) -> None:
    """Move what appeared in the old directory after it was looked through; nothing of the user's is deleted."""
    for entry in sorted(os.listdir(old)):
        target = os.path.join(new, entry)
        if not is_checkpoint_file(entry) and not os.path.lexists(target):
            source = os.path.join(old, entry)
            named("rename", target, lambda source=source, target=target: os.rename(source, target))  # type: ignore[misc]
