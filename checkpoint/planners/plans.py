"""The default plans: what a rank writes or reads for a flat state dict, and what all ranks write together.

Which items a tensor is made of is torch's to say (DTensor, ShardedTensor and whatever comes next); the rest is ours.
"""

# Annotations are objects here, not text, so that signatures compare equal with torch's.

import dataclasses
from typing import Any, TypeAlias

import torch
from torch.distributed.checkpoint.metadata import (
    STATE_DICT_TYPE,
    STORAGE_TYPES,
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import _create_chunk_list, _create_read_items, _create_write_items
from torch.distributed.tensor import DTensor

from ckptd.checkpoint.planners.coverage import check_reads
from ckptd.protocol.errors import BadPlan, Mismatch, MissingKeys

# torch's own object, so that signatures compare equal; it leaves its type variable open.
StateDict: TypeAlias = STATE_DICT_TYPE  # type: ignore[type-arg]


def create_default_local_save_plan(state_dict: dict[str, Any], is_coordinator: bool) -> SavePlan:
    """Return what this rank holds, as write items; replicas are left to an owner by the global plan.

    Args:
        state_dict: Flat: names to tensors and objects.
        is_coordinator: Changes nothing; part of torch's signature.
    """
    del is_coordinator
    items: list[WriteItem] = []
    for name, value in state_dict.items():
        if _is_here(value):
            items.extend(_create_write_items(name, value))
    return SavePlan(items)


def create_default_global_save_plan(
    all_plans: list[SavePlan],
    rewrite_index_hints: bool = True,
) -> tuple[list[SavePlan], Metadata]:
    """Return the plans of all ranks, and the metadata of the checkpoint that they make.

    Args:
        all_plans: By rank, without replicas.
        rewrite_index_hints: Note in every item where its chunk stands in the metadata.

    Raises:
        BadPlan: A name that is not sharded is in several plans, or the ranks disagree about a tensor.
    """
    found: dict[str, STORAGE_TYPES] = {}
    plans = []
    for plan in all_plans:
        items = []
        for item in plan.items:
            hint = _add(found, item)
            if rewrite_index_hints and hint is not None:
                index = MetadataIndex(item.index.fqn, item.index.offset, hint)
                items.append(dataclasses.replace(item, index=index))
            else:
                items.append(item)
        plans.append(dataclasses.replace(plan, items=items))
    return plans, Metadata(found)


def _add(found: dict[str, STORAGE_TYPES], item: WriteItem) -> int | None:
    """Add an item to the metadata and return the position of its chunk; None for an object."""
    name, known = item.index.fqn, found.get(item.index.fqn)
    if known is not None and item.type is not WriteItemType.SHARD:
        raise BadPlan(name, "two ranks would write it, and it is not sharded")
    if item.type is WriteItemType.BYTE_IO:
        found[name] = BytesStorageMetadata()
        return None
    data = item.tensor_data
    if data is None or data.chunk is None:
        raise BadPlan(name, "a tensor whose place is not known: the write item has no chunk")
    if known is None:
        found[name] = TensorStorageMetadata(properties=data.properties, size=data.size, chunks=[data.chunk])
        return 0
    if isinstance(known, BytesStorageMetadata):
        raise BadPlan(name, "one rank holds an object and another one a tensor under the same name")
    if known.size != data.size or known.properties.dtype != data.properties.dtype:
        one, other = _describe(known.properties.dtype, known.size), _describe(data.properties.dtype, data.size)
        raise BadPlan(name, f"the ranks disagree about the tensor: {one} and {other}")
    known.chunks.append(data.chunk)
    return len(known.chunks) - 1


def create_default_local_load_plan(
    state_dict: dict[str, Any],
    metadata: Metadata,
    strict: bool = True,
) -> LoadPlan:
    """Return what must be read to fill a flat state dict; a tensor may be stored in other chunks than it is held in.

    Args:
        state_dict: Names to tensors and objects.
        metadata: Of the checkpoint.
        strict: Refuse names that the checkpoint lacks; otherwise they are left as they are.

    Raises:
        MissingKeys: Names are missing; all are counted, before anything is read.
        Mismatch: A tensor has another shape, or the checkpoint holds only a part of it, or an object instead.
    """
    missing = [name for name in state_dict if name not in metadata.state_dict_metadata]
    if missing and strict:
        where = metadata.storage_meta.checkpoint_id if metadata.storage_meta is not None else None
        raise MissingKeys(str(where or "the checkpoint"), len(missing), missing[0])
    reads: list[ReadItem] = []
    for name, value in state_dict.items():
        stored = metadata.state_dict_metadata.get(name)
        if stored is not None:
            reads.extend(_reads(name, stored, value))
    return LoadPlan(reads)


def _reads(name: str, stored: STORAGE_TYPES, value: Any) -> list[ReadItem]:
    if isinstance(stored, BytesStorageMetadata):
        return list(_create_read_items(name, stored, value)) if _is_here(value) else []
    described = _describe(stored.properties.dtype, stored.size)
    if not isinstance(value, torch.Tensor):
        raise Mismatch(name, f"an object ({type(value).__name__})", f"a tensor, {described}")
    size = torch.Size(getattr(value, "global_shape", value.size()))
    if stored.size != size:
        raise Mismatch(name, _describe(value.dtype, size), described)
    if not _is_here(value):
        return []
    found: list[ReadItem] = _create_read_items(name, stored, value)
    check_reads(name, _create_chunk_list(value), found)
    return found


def _is_here(value: Any) -> bool:
    """Return whether this rank holds anything of a value: a DTensor's mesh may be of other ranks."""
    return not isinstance(value, DTensor) or value.device_mesh.get_coordinate() is not None


def _describe(dtype: torch.dtype, size: torch.Size) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(size)}"


def create_default_global_load_plan(all_plans: list[LoadPlan]) -> list[LoadPlan]:
    """Return the plans as they are: ranks read each for itself."""
    return all_plans
