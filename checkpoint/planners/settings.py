"""Which planners mean nothing but the default: torch's and our own classes, as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from torch.distributed.checkpoint import default_planner

from ckptd.checkpoint.planners.load import DefaultLoadPlanner
from ckptd.checkpoint.planners.save import DefaultSavePlanner

_SAVE: Final = (default_planner.DefaultSavePlanner, DefaultSavePlanner)
_LOAD: Final = (default_planner.DefaultLoadPlanner, DefaultLoadPlanner)


@dataclass(frozen=True, kw_only=True)
class SaveSettings:
    """What a default save planner was made with, apart from plan caching, which is on in any case."""

    flatten_state_dict: bool = True
    flatten_sharded_tensors: bool = True
    dedup_save_to_lowest_rank: bool = False


@dataclass(frozen=True, kw_only=True)
class LoadSettings:
    """What a default load planner was made with."""

    flatten_state_dict: bool = True
    flatten_sharded_tensors: bool = True
    allow_partial_load: bool = False


def save_settings(planner: object) -> SaveSettings | None:
    """Return the settings of a default save planner, or of None; nothing if the planner is the user's own.

    A subclass is the user's own, and so is a planner of which a method was replaced.
    """
    if planner is None:
        return SaveSettings()
    if not _is_plain(planner, _SAVE):
        return None
    return SaveSettings(
        flatten_state_dict=_flag(planner, "flatten_state_dict"),
        flatten_sharded_tensors=_flag(planner, "flatten_sharded_tensors"),
        dedup_save_to_lowest_rank=_flag(planner, "dedup_save_to_lowest_rank"),
    )


def load_settings(planner: object) -> LoadSettings | None:
    """Return the settings of a default load planner, or of None; nothing if the planner is the user's own."""
    if planner is None:
        return LoadSettings()
    if not _is_plain(planner, _LOAD):
        return None
    return LoadSettings(
        flatten_state_dict=_flag(planner, "flatten_state_dict"),
        flatten_sharded_tensors=_flag(planner, "flatten_sharded_tensors"),
        allow_partial_load=_flag(planner, "allow_partial_load"),
    )


def _is_plain(planner: object, kinds: tuple[type, ...]) -> bool:
    return type(planner) in kinds and not any(callable(getattr(type(planner), name, None)) for name in vars(planner))


def _flag(planner: Any, name: str) -> bool:
    return bool(getattr(planner, name))
