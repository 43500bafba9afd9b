"""`load`: brings a checkpoint into a state dict, in place. Needs no daemon, runs no collective."""

from __future__ import annotations

import io
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint._traverse import traverse_state_dict_v_2_3
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor

from ckptd.checkpoint.collector import collector_paused
from ckptd.checkpoint.directory import CheckpointDirectory
from ckptd.checkpoint.indexing.columns import Index
from ckptd.checkpoint.indexing.open import read_index
from ckptd.checkpoint.planning.chunks import is_meta
from ckptd.checkpoint.reading.files import Disk
from ckptd.client.loading.match import Leaves, LoadRules, Match, match
from ckptd.client.loading.plan import LoadPlan, LoadPlanner
from ckptd.client.loading.records import with_places
from ckptd.client.loading.report import LoadReport
from ckptd.client.loading.sources import ONLY_DISK, Brought, Sources, bring, of_one_save
from ckptd.client.logging_handlers import Phases
from ckptd.client.saving.flatten import Path, flatten, set_leaf, top_level
from ckptd.client.saving.snapshot import state_of
from ckptd.staging.image import scalar_value


def load_into(
    state_dict: dict[str, Any],
    path: str,
    *,
    rules: LoadRules,
    flat: bool = False,
    verify: bool = True,
    sources: Sources = ONLY_DISK,
) -> LoadReport:
    """Load the checkpoint at ``path`` into ``state_dict``.

    Args:
        state_dict: Tensors are filled in place, objects replaced, `Stateful` values given their state.
        path: Directory of the checkpoint.
        rules: What is let pass.
        flat: Take the top level as it is, as it was saved with `flatten_state_dict=False`.
        verify: Hold items against their hashes.
        sources: Where bytes may come from besides the disk.

    Returns:
        What was loaded and what was not.

    Raises:
        UnknownCheckpoint: There is no checkpoint.
        MissingKeys, Mismatch: The state dict does not fit; nothing was changed.
        StorageError: Bytes are missing or wrong; what the state dict's tensors hold now is undefined.
    """
    begun, phases = time.perf_counter(), Phases("load", path)
    state = state_of(state_dict)

    def attempt(directory: CheckpointDirectory, sources: Sources) -> _Attempt:
        index = read_index(path, opener=directory.open)
        leaves = top_level(state) if flat else _leaves_of(state, index)
        found = match(path, index, leaves, rules=rules)
        _materialise(state, leaves, found.names)
        index = with_places(path, index, found.rows, opener=directory.open)

        def plan() -> LoadPlan:
            made = LoadPlanner(path, index, verify=verify).plan(leaves, found)
            phases.end("plan")
            return made

        return _Attempt(leaves, found, bring(plan, index, Disk(directory.open), sources))

    # It would look at every tensor again and again: 100,000 took three times as long to plan. One look beside the
    # readers keeps them all waiting for the interpreter: 110 ms, three times as long as 350 MB took to copy.
    with collector_paused():
        done = of_one_save(path, sources, attempt)
    found, count = done.found, done.brought.count
    phases.end("read", nbytes=count.read_bytes)
    for name, data in done.brought.plan.objects.items():
        set_leaf(state, done.leaves[name][0], object_from(data))
    for key, value in state_dict.items():
        if isinstance(value, Stateful):
            value.load_state_dict(state[key])
        else:
            state_dict[key] = state[key]
    phases.end("finish", nbytes=count.read_bytes)
    return LoadReport(
        path=path,
        loaded=len(found.names),
        missing=tuple(found.missing),
        unexpected=tuple(found.unexpected),
        mismatched=tuple(found.mismatched),
        converted=tuple(found.converted),
        absent_optimizer_state=tuple(found.absent_optimizer_state),
        source=done.brought.source,
        needed_bytes=count.wanted_bytes,
        read_bytes=count.read_bytes,
        seconds=time.perf_counter() - begun,
    )


@dataclass(frozen=True)
class _Attempt:
    """What one look at the checkpoint has brought."""

    leaves: Leaves
    found: Match
    brought: Brought


def _leaves_of(state: dict[str, Any], index: Index) -> dict[str, tuple[Path, Any]]:
    """Return the leaves of a state dict under the names that the checkpoint uses.

    Before 2.4, torch saved a list that holds no tensor as one object; what it holds has names of its own since.
    """
    leaves = flatten(state)
    known = set(index.names)
    if leaves.keys() <= known:
        return leaves
    old: dict[str, tuple[Path, Any]] = {}

    def note(path: Path, value: Any) -> None:
        steps = tuple(step if isinstance(step, int) else str(step) for step in path)
        old[".".join(map(str, steps))] = (steps, value)

    traverse_state_dict_v_2_3(state, note)
    return old if (old.keys() - leaves.keys()) & known else leaves


def _materialise(state: dict[str, Any], leaves: dict[str, tuple[Path, Any]], names: Iterable[str]) -> None:
    """Put real tensors in the place of meta tensors."""
    for name in names:
        where, value = leaves[name]
        if isinstance(value, torch.Tensor) and is_meta(value):
            fresh = _materialised(value)
            leaves[name] = (where, fresh)
            set_leaf(state, where, fresh)


def _materialised(value: torch.Tensor) -> torch.Tensor:
    """Return memory for a meta tensor, as stock does: on the mesh's device, or else the CPU."""
    if not isinstance(value, DTensor):
        return torch.empty_like(value, device="cpu")
    local = torch.empty_like(value.to_local(), device=value.device_mesh.device_type)
    shape, stride = value.size(), value.stride()
    return DTensor.from_local(local, value.device_mesh, value.placements, run_check=False, shape=shape, stride=stride)


def object_from(data: bytes | bytearray) -> Any:
    """Return the object whose `torch.save` form is given.

    Scalars are parsed; anything else is unpickled, as stock does: load checkpoints only from whom you trust.
    """
    known, value = scalar_value(bytes(data))
    return value if known else torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
