"""What callers mean by their arguments: ids, and stock's own planners, writers and stagers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.staging import AsyncStager, BlockingAsyncStager, DefaultStager
from torch.distributed.checkpoint.storage import StorageWriter

from ckptd.checkpoint.indexing.open import read_index
from ckptd.checkpoint.planners.save import DefaultSavePlanner
from ckptd.checkpoint.planners.settings import save_settings
from ckptd.checkpoint.planning.items import BALANCED, LOWEST_RANK
from ckptd.checkpoint.stock.metadata import to_metadata
from ckptd.checkpoint.storage.filesystem import FileSystemWriter
from ckptd.checkpoint.storage.select import as_ours, local_path, writer_for
from ckptd.client.saving.handover import HANDED_OVER, HandOver, metadata_told
from ckptd.client.session.options import SaveRequest
from ckptd.protocol.errors import BadIndex, Unsupported
from ckptd.protocol.messages import Committed
from ckptd.protocol.retention_messages import Keep

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
    check_kind("planner", planner, SavePlanner)
    check_kind("storage_writer", storage_writer, StorageWriter)
    if checkpoint_id is None and storage_writer is None:
        raise Unsupported("a call without an id", "give checkpoint_id or storage_writer")
    settings, known = save_settings(planner), _ours(storage_writer)
    path = _native_path(checkpoint_id, known)
    if settings is None or path is None:
        hand_over = _hand_over(checkpoint_id, known, planner)
        return SaveRequest(
            _told_as(hand_over), HANDED_OVER, False, True, metadata_told, background, hand_over=hand_over
        )
    flat, lowest = not settings.flatten_state_dict, settings.dedup_save_to_lowest_rank
    overwrite = not isinstance(known, FileSystemWriter) or known.overwrite
    return SaveRequest(path, plan_settings(flat=flat, lowest=lowest), flat, overwrite, _read_metadata, background)


def manager_request(path: str, *, background: bool, user: str, keep: Keep | None) -> SaveRequest:
    """Return what a checkpoint manager asks for: a save in ckptd's own way, with what the user says of it.

    Args:
        path: Absolute path of the checkpoint.
        background: Whether the call shall return before all is staged.
        user: What is stored with the checkpoint.
        keep: What of its folder is kept after the commit.
    """
    settings = plan_settings(flat=False, lowest=False)
    return SaveRequest(path, settings, False, True, _read_metadata, background, user, keep)


def check_kind(name: str, value: object, kind: type[Any]) -> None:
    """Refuse an argument of another kind than it must be. Raises Unsupported."""
    if value is not None and not isinstance(value, kind):
        raise Unsupported(f"{name} {type(value).__name__}", f"give a {kind.__name__}")


def _ours(writer: StorageWriter | None) -> StorageWriter | None:
    """Return our own form of one of stock's writers; any other as it is."""
    if writer is None:
        return None
    try:
        ours = as_ours(writer)
    except Unsupported:
        return writer  # somebody's own
    return ours if isinstance(ours, StorageWriter) else writer


def _hand_over(
    checkpoint_id: CheckpointId | None, writer: StorageWriter | None, planner: SavePlanner | None
) -> HandOver:
    text = None if checkpoint_id is None else _checked(os.fspath(checkpoint_id))
    hand_over = HandOver(text, planner or DefaultSavePlanner(), writer or writer_for(text or ""))
    if _told_as(hand_over).startswith("memory://"):
        what = f"checkpoint id {_told_as(hand_over)!r}, which is memory of one process"
        raise Unsupported(what, "the daemon's worker is another one; give a path or an object store's URL")
    return hand_over


def _told_as(hand_over: HandOver) -> str:
    """Return the name under which the daemon and the future tell of a save by a user's own writer."""
    text = hand_over.checkpoint_id or str(getattr(hand_over.writer, "path", "") or type(hand_over.writer).__name__)
    return text if "://" in text else os.path.abspath(text)


def _native_path(checkpoint_id: CheckpointId | None, writer: StorageWriter | None) -> str | None:
    """Return the absolute path at which the daemon's workers write what the writer would; None if they cannot."""
    if writer is None:
        path = local_path(_checked(os.fspath(checkpoint_id or "")))
    elif type(writer) is FileSystemWriter and _is_plain(writer):
        path = local_path(_checked(os.fspath(checkpoint_id or writer.path)))
    else:
        return None
    return None if path is None else os.path.abspath(path)


def _is_plain(writer: FileSystemWriter) -> bool:
    one_file_per_rank = writer.single_file_per_rank and not writer.extensions
    return one_file_per_rank and writer.serialization_format is SerializationFormat.TORCH_SAVE


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
