"""Loading a ``torch.save`` file into sharded state: one rank reads, all others get each tensor by a broadcast.

`BroadcastingTorchSaveReader` and `DynamicMetaLoadPlanner` of torch.distributed.checkpoint.format_utils; they belong
together, and work with stock's `load` as with ours. Beyond stock: what is wrong is told to all ranks before the first
broadcast, so that none waits for ever; a rank without a shard of a tensor takes part all the same; the file may hold
other dtypes than the state dict; and without a process group there is nothing to broadcast.
"""

from __future__ import annotations

import errno
import os
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from ckptd.checkpoint.formats.objects import load_pickle
from ckptd.checkpoint.planners.load import DefaultLoadPlanner
from ckptd.checkpoint.planning.chunks import chunks_of
from ckptd.protocol.errors import (
    BadFile,
    CkptdError,
    Mismatch,
    MissingKeys,
    SystemCallFailed,
    Unsupported,
    from_report,
)

_Path = str | os.PathLike[str]


class BroadcastingTorchSaveReader(StorageReader):
    """Reads a ``torch.save`` file on one rank and broadcasts its tensors over the default process group.

    Use it with :class:`DynamicMetaLoadPlanner`. Tensors only. The file is unpickled, whatever it names: load only from
    whom you trust.

    Args:
        checkpoint_id: The file; `load` sets it from its own argument.
        coordinator_rank: The rank that reads.
    """

    def __init__(self, checkpoint_id: _Path | None = None, coordinator_rank: int = 0) -> None:
        self.checkpoint_id = checkpoint_id
        self.coordinator_rank = coordinator_rank
        self.is_coordinator = False

    def reset(self, checkpoint_id: _Path | None = None) -> None:
        """Take the file of the next load."""
        self.checkpoint_id = checkpoint_id

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return metadata of nothing: the planner makes its own from the state dict."""
        del args, kwargs
        return Metadata(state_dict_metadata={})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Find out whether this rank reads. Raises Unsupported without a file's name."""
        del metadata, is_coordinator, args, kwargs
        if self.checkpoint_id is None:
            raise Unsupported("a load without a file", "give checkpoint_id=...")
        self.is_coordinator = _rank() == (self.coordinator_rank if _in_group() else 0)

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the plan's tensors. A collective: all ranks call it, with the same names in their state dicts.

        Raises:
            Unsupported: A value is no tensor.
            MissingKeys, Mismatch: The file lacks a name or has another shape; alike on all ranks.
            BadFile, SystemCallFailed: The file cannot be loaded; alike on all ranks.
        """
        items: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                raise Unsupported(f"{item.storage_index.fqn}, which is no tensor,", "leave it out of the state dict")
            items.setdefault(item.storage_index.fqn, []).append(item)
        wanted: Mapping[str, torch.Tensor] = planner.state_dict  # type: ignore[attr-defined]  # all planners' that load
        found = self._open(planner, wanted)
        for name, target in wanted.items():
            tensor = self._broadcast(None if found is None else found[name], target)
            for item in items.get(name, ()):
                part = tensor
                # An item counts from the corner of its chunk, and the chunks of this metadata are the ranks' own.
                corner = item.storage_index.offset or (0,) * tensor.dim()
                for axis, (at, begin, length) in enumerate(
                    zip(corner, item.storage_offsets, item.lengths, strict=True)
                ):
                    part = part.narrow(axis, at + begin, length)
                destination = planner.resolve_tensor(item).detach()
                destination.copy_(part)
                planner.commit_tensor(item, destination)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: _Path) -> bool:
        """Return whether there is such a file."""
        return os.path.isfile(checkpoint_id)

    def _open(self, planner: LoadPlanner, wanted: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
        """Return the file's tensors on the rank that reads, None on the others; all ranks raise the same error."""
        found: dict[str, torch.Tensor] | None = None
        error: CkptdError | None = None
        if self.is_coordinator:
            try:
                found = _load(os.fspath(self.checkpoint_id or ""), wanted, flat=_is_flat(planner))
            except CkptdError as reason:
                error = reason
        if _in_group():
            told = [None if error is None else error.report()]
            dist.broadcast_object_list(told, src=self.coordinator_rank, device=_device())
            if told[0] is not None:
                error = from_report(told[0])
        if error is not None:
            raise error
        return found

    def _broadcast(self, found: torch.Tensor | None, target: torch.Tensor) -> torch.Tensor:
        if not _in_group():
            assert found is not None
            return found
        if found is None:
            tensor = torch.empty(target.size(), dtype=target.dtype, device=_device())
        else:
            tensor = found.detach().to(device=_device(), dtype=target.dtype).contiguous()
        dist.broadcast(tensor, src=self.coordinator_rank)
        return tensor


class DynamicMetaLoadPlanner(DefaultLoadPlanner):
    """Makes the metadata of a load from the state dict itself, for files that have none. Tensors only.

    Use it with :class:`BroadcastingTorchSaveReader`. Its arguments are those of DefaultLoadPlanner.
    """

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Take the state dict that is to be filled. Raises Unsupported if a value is no tensor."""
        super().set_up_planner(state_dict, metadata, is_coordinator)
        entries = {name: _metadata_of(name, value) for name, value in self.state_dict.items()}
        self.metadata = Metadata(state_dict_metadata=dict(entries))


def _metadata_of(name: str, value: Any) -> TensorStorageMetadata:
    if not isinstance(value, torch.Tensor):
        raise Unsupported(f"{name}, which is no tensor,", "leave it out of the state dict")
    chunks = [
        ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in chunks_of(name, value)
    ]
    return TensorStorageMetadata(TensorProperties(dtype=value.dtype), value.size(), chunks)


def _load(path: str, wanted: Mapping[str, torch.Tensor], *, flat: bool) -> dict[str, torch.Tensor]:
    """Return the wanted tensors of a file; they are mapped, not read."""
    if not os.path.isfile(path):
        raise SystemCallFailed("open", path, errno.ENOENT)
    state = load_pickle(path, path, trust=True, mmap=zipfile.is_zipfile(path))
    if not isinstance(state, dict):
        raise BadFile(path, f"it holds a {type(state).__name__}, not a state dict")
    if flat:
        state, _ = flatten_state_dict(state)
    missing = [name for name in wanted if name not in state]
    if missing:
        raise MissingKeys(path, len(missing), missing[0])
    for name, target in wanted.items():
        stored = state[name]
        if not isinstance(stored, torch.Tensor) or stored.size() != target.size():
            kind = f"shape {tuple(stored.size())}" if isinstance(stored, torch.Tensor) else "an object"
            raise Mismatch(name, f"shape {tuple(target.size())}", kind)
    return {name: state[name] for name in wanted}


def _is_flat(planner: LoadPlanner) -> bool:
    return bool(getattr(planner, "flatten_state_dict", True))


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def _rank() -> int:
    return dist.get_rank() if _in_group() else 0


def _device() -> torch.device:
    """Return where the default group can broadcast: in host memory if it can, else on this rank's accelerator."""
    kinds = [part.partition(":")[0] for part in dist.get_backend_config().split(",")]
    return torch.device("cpu" if "cpu" in kinds else kinds[0])
