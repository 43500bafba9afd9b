"""`load`: torch.distributed.checkpoint's function. Needs no daemon."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader

from ckptd.client.arguments import CheckpointId, path_of
from ckptd.client.load import load_into
from ckptd.protocol.errors import Unsupported

if TYPE_CHECKING:
    from torch.distributed.checkpoint.planner import LoadPlanner
    from torch.distributed.checkpoint.storage import StorageReader


def load(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: CheckpointId | None = None,
    storage_reader: StorageReader | None = None,
    planner: LoadPlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
) -> None:
    """Load a checkpoint into a state dict, in place; ours and stock's alike.

    The arguments are those of `torch.distributed.checkpoint.load`. Ranks read what they need each for itself: no
    collective runs, so ``process_group`` and ``no_dist`` change nothing.

    Raises:
        UnknownCheckpoint: There is no checkpoint under this id.
        MissingKeys, Mismatch: The state dict does not fit the checkpoint; nothing was changed.
        WrongBits, TruncatedFile, MissingFile: The checkpoint is damaged; load another one.
    """
    del process_group, no_dist
    path = path_of(checkpoint_id, storage_reader, FileSystemReader, "storage_reader")
    flat = partial = False
    if planner is not None:
        if type(planner) is not DefaultLoadPlanner:
            raise Unsupported(f"planner {type(planner).__name__}", "leave it out or give a DefaultLoadPlanner")
        flat, partial = not planner.flatten_state_dict, planner.allow_partial_load
    load_into(state_dict, path, partial=partial, flat=flat)
