"""`connect`, `async_save`, `save`, `load`: torch.distributed.checkpoint's functions, carried out by the daemon."""

from __future__ import annotations

import atexit
import dataclasses
import os
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
)
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.staging import AsyncStager, BlockingAsyncStager, DefaultStager
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from ckptd.checkpoint.items import BALANCED, LOWEST_RANK
from ckptd.checkpoint.metadata import to_metadata
from ckptd.checkpoint.open import read_index
from ckptd.client.futures import SaveFuture
from ckptd.client.identity import Identity, alone, of_group
from ckptd.client.load import load_into
from ckptd.client.session import SaveRequest, Session, SessionOptions
from ckptd.client.slots import OnBusy
from ckptd.protocol.errors import BadIndex, Unsupported

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner
    from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

CheckpointId = str | os.PathLike[str]

# One session per group of ranks that saves together, opened at the first save or by connect().
_sessions: dict[str, Session] = {}
_opening = threading.RLock()
_DEFAULT = "default"


def connect(
    state_dict: Mapping[str, Any] | None = None,
    *,
    job: str | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    process_group: dist.ProcessGroup | None = None,
    on_busy: OnBusy = "wait",
    staging: Literal["blocking", "background"] = "blocking",
    slots: int = 2,
    slot_bytes: int | None = None,
    connect_timeout_s: float = 60.0,
    busy_timeout_s: float = 600.0,
    progress_timeout_s: float = 300.0,
) -> Session:
    """Open the session ahead of the first save; all ranks must call it alike. Optional.

    Args:
        state_dict: What will be saved: plan it, and make, touch and pin the arena now.
        job: Name of the job; the default is unique to this start. Ranks told by arguments share it.
        rank: This process's rank, for jobs without a process group; needs ``world_size`` and ``job``.
        world_size: Number of ranks.
        process_group: The ranks that save together; the default is the default group, if there is one.
        on_busy: What a save does when all slots are being written: wait (at most ``busy_timeout_s``), skip or fail.
        staging: "blocking": `async_save` returns when the tensors may change. "background": it returns at once, and
            they may change when ``staging_completion`` is done; see :func:`wait_for_staging`.
        slots: How many saves can be staged at a time.
        slot_bytes: Size of a slot in bytes, made now and never enlarged; None sizes it by the first state dict.
        connect_timeout_s: How long to wait for the daemon, and for the other ranks, in seconds.
        busy_timeout_s: How long a save waits for a free slot, in seconds.
        progress_timeout_s: A save that has made no progress for so long fails on all ranks, in seconds.

    Raises:
        DaemonUnavailable: There is no daemon and none could be started.
        ShmTooSmall: The arena does not fit; nothing was made.
        CkptdError: See the message.
    """
    options = SessionOptions(
        on_busy=on_busy,
        staging=staging,
        slots=slots,
        slot_bytes=slot_bytes,
        connect_timeout_s=connect_timeout_s,
        busy_timeout_s=busy_timeout_s,
        progress_timeout_s=progress_timeout_s,
    )
    if (rank is None) != (world_size is None):
        raise Unsupported("rank without world_size, or the other way round", "give both or neither")
    with _opening:
        if rank is not None and world_size is not None:
            if job is None and world_size > 1:
                raise Unsupported("a job of several ranks without a name", "give connect(job=...), alike on all ranks")
            identity = Identity(job, rank, world_size) if job else alone()
            key = _DEFAULT
        else:
            identity = _identity(process_group, job=job, timeout_s=connect_timeout_s)
            key = _key(process_group, no_dist=False)
        _drop(key)
        session = Session(identity, options)
        _sessions[key] = session
    if state_dict is not None:
        session.prepare(state_dict, settings=_settings(flat=False, lowest=False))
    return session


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
    the work is done outside this process in any case. Failures after the call fail the future, on all ranks alike.

    Raises:
        Unsupported: An argument that ckptd cannot honour; nothing was staged.
        DaemonUnavailable: There is no daemon and none could be started.
    """
    del async_checkpointer_type
    background = _stages_in_background(async_stager)
    writer = (checkpoint_id, storage_writer)
    request = _request(writer, planner, use_collectives=use_collectives, background=background)
    session = _session(process_group, no_dist=no_dist)
    if session.options.staging == "background":
        request = dataclasses.replace(request, background=True)
    return session.save(state_dict, request)


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
    writer = (checkpoint_id, storage_writer)
    request = _request(writer, planner, use_collectives=use_collectives, background=False)
    session = _session(process_group, no_dist=no_dist)
    return session.save(state_dict, request).result()


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
    path = _path(checkpoint_id, storage_reader, FileSystemReader, "storage_reader")
    flat = partial = False
    if planner is not None:
        if type(planner) is not DefaultLoadPlanner:
            raise Unsupported(f"planner {type(planner).__name__}", "leave it out or give a DefaultLoadPlanner")
        flat, partial = not planner.flatten_state_dict, planner.allow_partial_load
    load_into(state_dict, path, partial=partial, flat=flat)


def wait_for_staging(optimizer: torch.optim.Optimizer) -> Any:
    """Make `optimizer.step` wait until the last save of this process is staged.

    Args:
        optimizer: Whose steps change the saved tensors.

    Returns:
        torch's handle of the hook; its ``remove()`` takes the hook out.
    """

    def wait(*_: Any) -> None:
        for session in list(_sessions.values()):
            session.wait_for_staging()

    return optimizer.register_step_pre_hook(wait)


# --- sessions ----------------------------------------------------------------------------------------------------


def _session(group: dist.ProcessGroup | None, *, no_dist: bool) -> Session:
    key = _key(group, no_dist=no_dist)
    with _opening:
        session = _sessions.get(key)
        if session is not None and session.live:
            return session
        identity, options = _identity(group, job=None, timeout_s=60.0, no_dist=no_dist), SessionOptions()
        if session is not None:
            # The daemon went away: reach the one that took its place, as who we were.
            identity, options = session.identity_for_reopening(identity), session.options
            session.close()
        _sessions[key] = session = Session(identity, options)
        return session


def _key(group: dist.ProcessGroup | None, *, no_dist: bool) -> str:
    if no_dist:
        return "no_dist"
    if group is None:
        return _DEFAULT
    return "ranks " + "-".join(str(rank) for rank in dist.get_process_group_ranks(group))


def _identity(group: dist.ProcessGroup | None, *, job: str | None, timeout_s: float, no_dist: bool = False) -> Identity:
    if no_dist or not dist.is_available() or not dist.is_initialized():
        return alone(job)
    return of_group(group, job=job, timeout_s=timeout_s)


def _drop(key: str) -> None:
    session = _sessions.pop(key, None)
    if session is not None:
        session.close()


def _close_all() -> None:
    for key in list(_sessions):
        _drop(key)


# A forked child (a data loader's worker) must not speak in its parent's name.
os.register_at_fork(after_in_child=_sessions.clear)
atexit.register(_close_all)


# --- arguments ---------------------------------------------------------------------------------------------------


def _request(
    writer: tuple[CheckpointId | None, StorageWriter | None],
    planner: SavePlanner | None,
    *,
    use_collectives: bool,
    background: bool,
) -> SaveRequest:
    checkpoint_id, storage_writer = writer
    path = _path(checkpoint_id, storage_writer, FileSystemWriter, "storage_writer")
    if not use_collectives:
        raise Unsupported("use_collectives=False", "leave it out: ckptd runs no collectives in any case")
    flat, lowest = False, False
    if planner is not None:
        if type(planner) is not DefaultSavePlanner:
            raise Unsupported(f"planner {type(planner).__name__}", "leave it out or give a DefaultSavePlanner")
        flat, lowest = not planner.flatten_state_dict, planner.dedup_save_to_lowest_rank
    settings = _settings(flat=flat, lowest=lowest)
    return SaveRequest(path, settings, flat, _overwrites(storage_writer), _read_metadata, background)


def _settings(*, flat: bool, lowest: bool) -> str:
    """Return the planner settings that change a plan; part of its digest."""
    return f"flat={flat} {LOWEST_RANK if lowest else BALANCED}"


def _path(checkpoint_id: CheckpointId | None, storage: Any, kind: type[Any], name: str) -> str:
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


def _stages_in_background(stager: AsyncStager | None) -> bool:
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
