"""What callers mean by their arguments: ids, and stock's own planners, writers and stagers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.staging import AsyncStager, BlockingAsyncStager, DefaultStager

from ckptd.checkpoint.items import BALANCED, LOWEST_RANK
from ckptd.checkpoint.metadata import to_metadata
from ckptd.checkpoint.open import read_index
from ckptd.client.session import SaveRequest
from ckptd.protocol.errors import BadIndex, Unsupported

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.checkpoint.planner import SavePlanner
    from torch.distributed.checkpoint.storage import StorageWriter

CheckpointId = str | os.PathLike[str]


def save_request(
    writer: tuple[CheckpointId | None, StorageWriter | None],
    planner: SavePlanner | None,
    *,
    use_collectives: bool,
    background: bool,
) -> SaveRequest:
    """Return what a call of `save` or `async_save` asks for. Raises Unsupported."""
    checkpoint_id, storage_writer = writer
    path = path_of(checkpoint_id, storage_writer, FileSystemWriter, "storage_writer")
    if not use_collectives:
        raise Unsupported("use_collectives=False", "leave it out: ckptd runs no collectives in any case")
    flat, lowest = False, False
    if planner is not None:
        if type(planner) is not DefaultSavePlanner:
            raise Unsupported(f"planner {type(planner).__name__}", "leave it out or give a DefaultSavePlanner")
        flat, lowest = not planner.flatten_state_dict, planner.dedup_save_to_lowest_rank
    settings = plan_settings(flat=flat, lowest=lowest)
    return SaveRequest(path, settings, flat, _overwrites(storage_writer), _read_metadata, background)


def plan_settings(*, flat: bool, lowest: bool) -> str:
    """Return the planner settings that change a plan; part of its digest."""
    return f"flat={flat} {LOWEST_RANK if lowest else BALANCED}"


def path_of(checkpoint_id: CheckpointId | None, storage: Any, kind: type[Any], name: str) -> str:
    """Return the absolute path that is meant by an id or a stock storage object."""
    if storage is not None and type(storage) is not kind:
        raise Unsupported(f"{name} {type(storage).__name__}", f"give checkpoint_id or a {kind.__name__}")
    if checkpoint_id is None:
        if storage is None:
            raise Unsupported("a call without an id", f"give checkpoint_id or {name}")
        checkpoint_id = storage.path
    text = os.fspath(checkpoint_id)
    if not text or "\0" in text:
        raise Unsupported(f"checkpoint id {text!r}", "give the path of a directory")
    if "://" in text:
        raise Unsupported(f"checkpoint id {text!r}", "object stores come later; give the path of a directory")
    return os.path.abspath(text)


def _overwrites(writer: StorageWriter | None) -> bool:
    if not isinstance(writer, FileSystemWriter):
        return True
    if not writer.single_file_per_rank:
        raise Unsupported("FileSystemWriter(single_file_per_rank=False)", "leave it out: a rank writes one file")
    if writer.serialization_format is not SerializationFormat.TORCH_SAVE:
        raise Unsupported(f"FileSystemWriter({writer.serialization_format})", "use TORCH_SAVE")
    if writer.transforms.extensions:
        raise Unsupported("FileSystemWriter(_extensions=...)", "leave them out")
    return bool(writer.overwrite)


def stages_in_background(stager: AsyncStager | None) -> bool:
    """Return whether a stager asks for staging beside the trainer. Raises Unsupported."""
    if stager is None or isinstance(stager, BlockingAsyncStager):
        return False
    if type(stager) is DefaultStager:
        return bool(stager._config.use_async_staging)
    raise Unsupported(f"async_stager {type(stager).__name__}", "leave it out: ckptd stages into its own arena")


def _read_metadata(checkpoint_id: str, save_id: str) -> Metadata:
    index = read_index(checkpoint_id)
    if index.header.get("save_id") != save_id:
        raise BadIndex(checkpoint_id, "it was overwritten by a later save")
    return to_metadata(index)
