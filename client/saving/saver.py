"""`async_save` and `save`: torch.distributed.checkpoint's functions, carried out by the daemon."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from typing_extensions import deprecated

from ckptd.client.arguments import CheckpointId, is_users_stager, save_request, stages_in_background
from ckptd.client.failures import as_checkpoint_failure
from ckptd.client.saving.futures import SaveFuture
from ckptd.client.session.sessions import policy_for, session_for

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.checkpoint.planner import SavePlanner
    from torch.distributed.checkpoint.storage import StorageWriter


@as_checkpoint_failure()
def async_save(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: CheckpointId | None = None,
    storage_writer: StorageWriter | None = None,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    async_checkpointer_type: AsyncCheckpointerType = AsyncCheckpointerType.THREAD,
    async_stager: AsyncStager | None = None,
    no_dist: bool = False,
    use_collectives: bool = True,
) -> SaveFuture:
    """Stage a state dict and have the daemon make it durable while training goes on.

    The arguments are those of `torch.distributed.checkpoint.async_save`. ``async_checkpointer_type`` changes nothing:
    the work is done outside this process in any case; nor does ``use_collectives``: none are used. A planner or writer
    of the user's own runs in a worker, on the staged tensors. Failures after the call fail the future, on all ranks
    alike.

    Raises:
        Unsupported: An argument that ckptd cannot honour; nothing was staged.
        DaemonUnavailable: There is no daemon and none could be started.
    """
    del async_checkpointer_type, use_collectives
    background = stages_in_background(async_stager)
    users_stager = async_stager if is_users_stager(async_stager) else None
    writer = (checkpoint_id, storage_writer)
    request = save_request(writer, planner, background=background)

    def begin() -> SaveFuture:
        session = session_for(process_group, no_dist=no_dist)
        mine = dataclasses.replace(request, background=background or session.options.staging == "background")
        if users_stager is None:
            return session.save(state_dict, mine)
        return _save_staged_by(users_stager, state_dict, lambda staged: session.save(staged, mine))

    return policy_for(process_group, no_dist=no_dist).save(begin, checkpoint_id=request.checkpoint_id)


@as_checkpoint_failure()
def save(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: CheckpointId | None = None,
    storage_writer: StorageWriter | None = None,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    use_collectives: bool = True,
) -> Metadata:
    """Save a state dict and return its metadata once it is durable. Arguments and errors as :func:`async_save`."""
    del use_collectives
    writer = (checkpoint_id, storage_writer)
    request = save_request(writer, planner, background=False)

    def begin() -> SaveFuture:
        return session_for(process_group, no_dist=no_dist).save(state_dict, request)

    return policy_for(process_group, no_dist=no_dist).save(begin, told=True).result()


def _save_staged_by(
    stager: AsyncStager, state_dict: dict[str, Any], save: Callable[[dict[str, Any]], SaveFuture]
) -> SaveFuture:
    """Save what a user's own stager makes of a state dict; the copy into the arena is ours all the same."""
    staged = stager.stage(state_dict)
    future = save(staged.result() if isinstance(staged, Future) else staged)
    if stager.should_synchronize_after_execute:
        stager.synchronize_staging()
    return future


@deprecated(
    "`save_state_dict` is deprecated and will be removed in future versions. Please use `save` instead.",
    category=FutureWarning,
)
def save_state_dict(
    state_dict: dict[str, Any],
    storage_writer: StorageWriter,
    process_group: dist.ProcessGroup | None = None,
    coordinator_rank: int = 0,
    no_dist: bool = False,
    planner: SavePlanner | None = None,
) -> Metadata:
    """Save as :func:`save` does. Deprecated by torch; there for programs that still call it.

    Args:
        state_dict: See :func:`save`.
        storage_writer: See there.
        process_group: See there.
        coordinator_rank: Changes nothing: daemons coordinate a save.
        no_dist: See there.
        planner: See there.
    """
    del coordinator_rank
    storage_writer.reset()
    return save(
        state_dict, storage_writer=storage_writer, process_group=process_group, no_dist=no_dist, planner=planner
    )
