"""`DefaultSavePlanner`: torch's planner protocol for saves, for users who override a step of it.

Works under torch's own `save` as well as under ours. Exactly this class, not a subclass, never runs under ours: the
daemon then plans in columns, with the same outcome.
"""

# Annotations are objects here, not text, so that signatures compare equal with torch's.

import dataclasses
import io
import logging
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch.distributed.checkpoint._nested_dict import FLATTEN_MAPPING, flatten_state_dict
from torch.distributed.checkpoint._sharded_tensor_utils import _flatten_sharded_tensors
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.utils import find_state_dict_object

from ckptd.checkpoint.planners.cache import PROCESS_CACHE, Offer, PlanCache
from ckptd.checkpoint.planners.coverage import check_coverage
from ckptd.checkpoint.planners.plans import StateDict, create_default_global_save_plan, create_default_local_save_plan
from ckptd.checkpoint.planners.replicas import dedup_save_plans

logger = logging.getLogger(__name__)

# Who overrides one of these may make another plan each time, which no cache can know.
_STEPS: Final = (
    "create_local_plan",
    "create_global_plan",
    "finish_plan",
    "_create_global_plan",
    "_dedup_save_plans",
)


class DefaultSavePlanner(SavePlanner):
    """Saves every tensor and object of a state dict, each once.

    Args:
        flatten_state_dict: Walk into nested mappings and lists; otherwise the top level is taken as it is.
        flatten_sharded_tensors: Look through sharded tensors of sharded tensors (FSDP over tensor parallelism).
        dedup_replicated_tensors: Deprecated by torch and without effect: replicas are always written once.
        dedup_save_to_lowest_rank: Leave replicas to the lowest rank, instead of balancing them by bytes.
        enable_plan_caching: Send plans only when they have changed. Has no effect in a subclass that overrides
            `create_local_plan`, `create_global_plan` or `finish_plan`.
    """

    mappings: FLATTEN_MAPPING
    _cache: PlanCache = PROCESS_CACHE  # of the process, because planners are made anew for every save

    def __init__(
        self,
        flatten_state_dict: bool = True,
        flatten_sharded_tensors: bool = True,
        dedup_replicated_tensors: bool | None = None,
        dedup_save_to_lowest_rank: bool = False,
        enable_plan_caching: bool = False,
    ) -> None:
        self.flatten_state_dict = flatten_state_dict
        self.flatten_sharded_tensors = flatten_sharded_tensors
        self.mappings = {}
        self.dedup_save_to_lowest_rank = dedup_save_to_lowest_rank
        if dedup_replicated_tensors is not None:
            logger.warning(
                "dedup_replicated_tensors has no effect: replicas are written once in any case; leave it out"
            )
        self._enable_plan_caching = enable_plan_caching
        self._offer: Offer | None = None

    def set_up_planner(
        self,
        state_dict: StateDict,
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Take the state dict of one save, flattened as the settings say."""
        del storage_meta
        if self.flatten_state_dict:
            state_dict, self.mappings = flatten_state_dict(state_dict)
        if self.flatten_sharded_tensors:
            state_dict = _flatten_sharded_tensors(state_dict)
        self.state_dict = state_dict
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        """Return what this rank holds; with plan caching only the name of it, if the coordinator knows it."""
        plan = create_default_local_save_plan(self.state_dict, self.is_coordinator)
        if self.flatten_state_dict:
            plan = dataclasses.replace(plan, planner_data=self.mappings)
        self.plan = plan
        if not self._caches():
            return plan
        self._offer = self._cache.offer(plan, self._settings())
        return self._offer.sent

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Return what each rank writes, and the metadata of the checkpoint.

        Raises:
            BadPlan: The plans leave a gap, overlap or contradict each other; the key is named.
        """
        if self._caches():
            answers, whole = self._cache.answer(all_plans, self._settings(), self._create_global_plan)
        else:
            whole = self._create_global_plan(all_plans)
            answers = whole[0]
        self.global_plan, self.metadata = whole
        return answers, self.metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Return what this rank is to write."""
        if self._offer is not None and self._caches():
            new_plan = self._cache.accept(new_plan, self._offer, self._settings())
        self.plan = new_plan
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """Return the value of an item, as the storage writer shall have it."""
        found: torch.Tensor | io.BytesIO = self.transform_object(write_item, self.lookup_object(write_item.index))
        return found

    def lookup_object(self, index: MetadataIndex) -> Any:
        """Return what the state dict holds under an index. To be overridden."""
        return find_state_dict_object(self.state_dict, index)

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        """Return a value as it is to be written: a tensor, or else its `torch.save` form. To be overridden."""
        if write_item.type is not WriteItemType.BYTE_IO:
            return object
        buffer = io.BytesIO()
        torch.save(object, buffer)
        return buffer

    def _dedup_save_plans(self, all_plans: list[SavePlan]) -> list[SavePlan]:
        return dedup_save_plans(all_plans, self.dedup_save_to_lowest_rank)

    def _create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = create_default_global_save_plan(self._dedup_save_plans(all_plans))
        if self.flatten_state_dict:
            metadata = dataclasses.replace(metadata, planner_data=_merged(plans))
        # A rank that saves for itself may hold a part only; several that save together must hold everything.
        check_coverage(metadata, complete=len(plans) > 1)
        return plans, metadata

    def _caches(self) -> bool:
        """Return whether plans may be kept: whoever overrides a step of planning may make another plan each time."""
        kind = type(self)
        return self._enable_plan_caching and all(
            getattr(kind, step) is getattr(DefaultSavePlanner, step) for step in _STEPS
        )

    def _settings(self) -> str:
        flags = (self.flatten_state_dict, self.flatten_sharded_tensors, self.dedup_save_to_lowest_rank)
        return f"{type(self).__module__}.{type(self).__qualname__} {flags}"


def _merged(plans: list[SavePlan]) -> FLATTEN_MAPPING:
    """Return the paths of all names; what a user put in their place is the user's to merge."""
    merged: FLATTEN_MAPPING = {}
    for plan in reversed(plans):
        if isinstance(plan.planner_data, Mapping):
            merged.update(plan.planner_data)
    return merged
