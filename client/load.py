"""`load`: brings a checkpoint into a state dict, in place. Needs no daemon, runs no collective."""

from __future__ import annotations

import io
from typing import Any, Final

import torch
from torch.distributed.checkpoint.stateful import Stateful

from ckptd.checkpoint.open import read_index
from ckptd.checkpoint.read import read_all
from ckptd.client.flatten import flatten, set_leaf, top_level
from ckptd.client.load_plan import LoadPlanner
from ckptd.client.snapshot import state_of
from ckptd.staging.image import scalar_value

# Four readers fill the queue of one NVMe device; more gain nothing. Measured: 4 and 8 threads within noise.
READ_THREADS: Final = 4


def load_into(state_dict: dict[str, Any], path: str, *, partial: bool, flat: bool, verify: bool = True) -> None:
    """Load the checkpoint at ``path`` into ``state_dict``.

    Args:
        state_dict: Tensors are filled in place, objects replaced, `Stateful` values given their state.
        path: Directory of the checkpoint.
        partial: Leave names alone that the checkpoint lacks.
        flat: Take the top level as it is, as it was saved with `flatten_state_dict=False`.
        verify: Hold items against their hashes.

    Raises:
        UnknownCheckpoint: There is no checkpoint.
        MissingKeys, Mismatch: The state dict does not fit; nothing was changed.
        StorageError: Bytes are missing or wrong; what the state dict's tensors hold now is undefined.
    """
    index = read_index(path)
    state = state_of(state_dict)
    leaves = top_level(state) if flat else flatten(state)
    for name, (where, value) in leaves.items():
        if isinstance(value, torch.Tensor) and type(value) is torch.Tensor and value.is_meta:
            fresh = torch.empty_like(value, device="cpu")
            leaves[name] = (where, fresh)
            set_leaf(state, where, fresh)
    plan = LoadPlanner(path, index, verify=verify).plan(leaves, partial=partial)
    read_all(plan.reads, threads=READ_THREADS)
    for name, data in plan.objects.items():
        set_leaf(state, leaves[name][0], object_from(data))
    for key, value in state_dict.items():
        if isinstance(value, Stateful):
            value.load_state_dict(state[key])
        else:
            state_dict[key] = state[key]


def object_from(data: bytes | bytearray) -> Any:
    """Return the object whose `torch.save` form is given.

    Scalars are parsed; anything else is unpickled, as stock does: load checkpoints only from whom you trust.
    """
    known, value = scalar_value(bytes(data))
    return value if known else torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
