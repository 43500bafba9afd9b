"""`DefaultLoadPlanner`: torch's planner protocol for loads, for users who override a step of it."""

# Annotations are objects here, not text, so that signatures compare equal with torch's.

import io
from collections.abc import Collection
from typing import Any

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint._nested_dict import FLATTEN_MAPPING, flatten_state_dict
from torch.distributed.checkpoint._sharded_tensor_utils import _flatten_sharded_tensors
from torch.distributed.checkpoint._traverse import set_element, traverse_state_dict_v_2_3
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import _init_state_dict
from torch.distributed.checkpoint.utils import find_state_dict_object

from ckptd.checkpoint.planners.plans import StateDict, create_default_global_load_plan, create_default_local_load_plan
from ckptd.protocol.errors import Unsupported


class DefaultLoadPlanner(LoadPlanner):
    """Fills a state dict in place.

    Args:
        flatten_state_dict: Walk into nested mappings and lists, as the save did.
        flatten_sharded_tensors: Look through sharded tensors of sharded tensors (FSDP over tensor parallelism).
        allow_partial_load: Leave names alone that the checkpoint lacks, instead of raising MissingKeys.
    """

    original_state_dict: StateDict
    mappings: FLATTEN_MAPPING

    def __init__(
        self,
        flatten_state_dict: bool = True,
        flatten_sharded_tensors: bool = True,
        allow_partial_load: bool = False,
    ) -> None:
        self.flatten_state_dict = flatten_state_dict
        self.flatten_sharded_tensors = flatten_sharded_tensors
        self.original_state_dict = {}
        self.mappings = {}
        self.allow_partial_load = allow_partial_load

    def set_up_planner(
        self,
        state_dict: StateDict,
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Take the state dict that is to be filled; meta tensors in it become real ones."""
        _init_state_dict(state_dict)
        self.original_state_dict = state_dict
        if self.flatten_sharded_tensors:
            state_dict = _flatten_sharded_tensors(state_dict)
        if self.flatten_state_dict:
            state_dict, self.mappings = flatten_state_dict(state_dict)
        self.state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> LoadPlan:
        """Return what this rank must read.

        Raises:
            MissingKeys, Mismatch: The state dict does not fit the checkpoint; nothing was changed.
        """
        if self.metadata is None:
            raise Unsupported("a planner without metadata", "call set_up_planner(state_dict, metadata) first")
        if self.flatten_state_dict:
            self._take_old_names(self.metadata.state_dict_metadata.keys())
        return create_default_local_load_plan(self.state_dict, self.metadata, not self.allow_partial_load)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans as they are: ranks read each for itself."""
        return create_default_global_load_plan(global_plan)

    def finish_plan(self, new_plan: LoadPlan) -> LoadPlan:
        """Return what this rank is to read."""
        return new_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put an object in its place. It is unpickled: load checkpoints only from whom you trust."""
        name = read_item.dest_index.fqn
        loaded = torch.load(value, weights_only=False)
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], loaded)
        else:
            self.state_dict[name] = loaded

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """Return the part of a tensor that is to be filled."""
        tensor = self.lookup_tensor(read_item.dest_index)
        found: torch.Tensor = self.transform_tensor(read_item, tensor)
        return found

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Take note that a tensor is filled. To be overridden."""

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """Return the tensor that the state dict holds under an index. To be overridden."""
        found: torch.Tensor = find_state_dict_object(self.state_dict, index)
        return found

    def transform_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> torch.Tensor:
        """Return the part of a tensor that an item fills. To be overridden."""
        return narrow_tensor_by_index(tensor, read_item.dest_offsets, read_item.lengths)

    def _take_old_names(self, stored: Collection[str]) -> None:
        """Name things as torch did before 2.4, if the checkpoint does: what held no tensor was one object."""
        unclaimed = set(stored) - set(self.state_dict)
        if not unclaimed:
            return
        old: StateDict = {}
        paths: FLATTEN_MAPPING = {}

        def note(path: tuple[str | int, ...], value: object) -> None:
            name = ".".join(str(step) for step in path)
            old[name], paths[name] = value, path

        traverse_state_dict_v_2_3(self.original_state_dict, note)
        if unclaimed & set(old):
            self.state_dict, self.mappings = old, paths


class EmptyStateDictLoadPlanner(DefaultLoadPlanner):
    """Makes the state dict from the checkpoint: for tools that have no model at hand. Each process gets all of it.

    Args:
        keys: Names to load, or the names of mappings of which everything is loaded; None loads the whole checkpoint.
        flatten_state_dict: As for DefaultLoadPlanner, and so are the others.
        flatten_sharded_tensors: See there.
        allow_partial_load: See there.
    """

    def __init__(
        self,
        keys: Collection[str] | None = None,
        flatten_state_dict: bool = True,
        flatten_sharded_tensors: bool = True,
        allow_partial_load: bool = False,
    ) -> None:
        self.keys = keys
        super().__init__(flatten_state_dict, flatten_sharded_tensors, allow_partial_load)

    def set_up_planner(
        self,
        state_dict: StateDict,
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Fill an empty state dict with empty tensors, as the checkpoint has them."""
        if state_dict:
            raise Unsupported("a state dict with something in it", "give an empty one: it is made from the checkpoint")
        if metadata is None:
            raise Unsupported("a planner without metadata", "call set_up_planner(state_dict, metadata)")
        paths = metadata.planner_data if isinstance(metadata.planner_data, dict) else {}
        left_out = set()
        for name, stored in metadata.state_dict_metadata.items():
            path = paths.get(name, (name,))
            if not self._is_wanted(name, path):
                left_out.add(name)
                continue
            blank: Any = stored
            if isinstance(stored, TensorStorageMetadata):
                blank = torch.empty(stored.size, dtype=stored.properties.dtype)
            set_element(state_dict, path, blank)
        super().set_up_planner(state_dict, metadata, is_coordinator)
        # Of a list only some elements may be wanted: None stands for the others, and is not to be read.
        self.state_dict = {name: value for name, value in self.state_dict.items() if name not in left_out}

    def _is_wanted(self, name: str, path: tuple[str | int, ...]) -> bool:
        if self.keys is None or name in self.keys:
            return True
        above = [".".join(str(step) for step in path[:length]) for length in range(1, len(path) + 1)]
        return any(prefix in self.keys for prefix in above)
