"""What callers mean by their arguments: ids, and stock's own planners, writers and stagers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.staging import AsyncStager, BlockingAsyncStager, DefaultStager
from torch.distributed.checkpoint.storage import StorageWriter

from ckptd.checkpoint.items import BALANCED, LOWEST_RANK
from ckptd.checkpoint.metadata import to_metadata
from ckptd.checkpoint.open import read_index
from ckptd.client.handover import HANDED_OVER, HandOver, metadata_told
from ckptd.client.session import SaveRequest
from ckptd.protocol.errors import BadIndex, Unsupported
from ckptd.protocol.messages import Committed

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

CheckpointId = str | os.PathLike[str]


def save_request(
    writer: tuple[CheckpointId | None, StorageWriter | None],
    planner: SavePlanner | None,
    *,
    background: bool,
) -> SaveRequest:
    """Return what a call of `save` or `async_save` asks for.

    Our own planner and file-system writer, and stock's, are not called: the daemon does what they would do. Any other
    planner or writer is handed over to a worker.

    Args:
        writer: The id and the storage writer of the call; one of the two may be None.
        planner: The planner of the call.
        background: Whether the call shall return before all is staged.

    Raises:
        Unsupported: Neither names a place.
    """
    checkpoint_id, storage_writer = writer
    _check_kind("planner", planner, SavePlanner)
    _check_kind("storage_writer", storage_writer, StorageWriter)
    if (planner is None or is_default(planner)) and _is_native(checkpoint_id, storage_writer):
        path = path_of(checkpoint_id, storage_writer, FileSystemWriter, "storage_writer")
        flat = planner is not None and not planner.flatten_state_dict
        lowest = planner is not None and planner.dedup_save_to_lowest_rank
        overwrite = storage_writer is None or bool(storage_writer.overwrite)
        settings = plan_settings(flat=flat, lowest=lowest)
        return SaveRequest(path, settings, flat, overwrite, _read_metadata, background)
    hand_over = _hand_over(checkpoint_id, storage_writer, planner)
    return SaveRequest(_told_as(hand_over), HANDED_OVER, False, True, metadata_told, background, hand_over)


def _check_kind(name: str, value: object, kind: type[Any]) -> None:
    if value is not None and not isinstance(value, kind):
        raise Unsupported(f"{name} {type(value).__name__}", f"give a {kind.__name__}")


def _hand_over(
    checkpoint_id: CheckpointId | None, writer: StorageWriter | None, planner: SavePlanner | None
) -> HandOver:
    text = None if checkpoint_id is None else _checked(os.fspath(checkpoint_id))
    if writer is None:
        if text is None:
            raise Unsupported("a call without an id", "give checkpoint_id or storage_writer")
        writer = writer_for(text)
    return HandOver(text, planner or DefaultSavePlanner(), writer)


def _told_as(hand_over: HandOver) -> str:
    """Return the name under which the daemon and the future tell of a save by a user's own writer."""
    text = hand_over.checkpoint_id or str(getattr(hand_over.writer, "path", "") or type(hand_over.writer).__name__)
    return text if "://" in text else os.path.abspath(text)


def _is_native(checkpoint_id: CheckpointId | None, writer: StorageWriter | None) -> bool:
    """Return whether the daemon's workers write what a writer would: a plain file-system checkpoint."""
    if "://" in os.fspath(checkpoint_id or ""):
        return False
    if writer is None:
        return True
    return type(writer) is FileSystemWriter and (
        writer.single_file_per_rank
        and writer.serialization_format is SerializationFormat.TORCH_SAVE
        and not writer.transforms.extensions
    )


def plan_settings(*, flat: bool, lowest: bool) -> str:
    """Return the planner settings that change a plan; part of its digest."""
    return f"flat={flat} {LOWEST_RANK if lowest else BALANCED}"


def path_of(checkpoint_id: CheckpointId | None, storage: Any, kind: type[Any], name: str) -> str:
    """Return the absolute path that is meant by an id or a file-system storage object. Raises Unsupported."""
    if storage is not None and type(storage) is not kind:
        raise Unsupported(f"{name} {type(storage).__name__}", f"give checkpoint_id or a {kind.__name__}")
    if checkpoint_id is None:
        if storage is None:
            raise Unsupported("a call without an id", f"give checkpoint_id or {name}")
        checkpoint_id = storage.path
    text = _checked(os.fspath(checkpoint_id))
    if "://" in text:
        raise Unsupported(f"checkpoint id {text!r}", "give the path of a directory")
    return os.path.abspath(text)


def _checked(text: str) -> str:
    if not text or "\0" in text:
        raise Unsupported(f"checkpoint id {text!r}", "give the path of a directory, or a URL such as s3://bucket/key")
    return text


def is_default(planner: SavePlanner) -> bool:
    """Return whether a planner does what the daemon does without it; a subclass may do anything."""
    return type(planner) is DefaultSavePlanner


def writer_for(checkpoint_id: str) -> StorageWriter:
    return FileSystemWriter(checkpoint_id)


def stages_in_background(stager: AsyncStager | None) -> bool:
    """Return whether a stager asks for staging beside the trainer."""
    return type(stager) is DefaultStager and bool(stager._config.use_async_staging)


def is_users_stager(stager: AsyncStager | None) -> bool:
    """Return whether a stager has to be called: what torch's own stagers do, the session does into its arena."""
    return stager is not None and type(stager) is not DefaultStager and not isinstance(stager, BlockingAsyncStager)


def _read_metadata(checkpoint_id: str, committed: Committed) -> Metadata:
    index = read_index(checkpoint_id)
    if index.header.get("save_id") != committed.save_id:
        raise BadIndex(checkpoint_id, "it was overwritten by a later save")
    return to_metadata(index)
