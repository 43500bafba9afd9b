"""Nested state dicts as flat ones, with torch.distributed.checkpoint's names.

Mappings are walked; a list is walked if a tensor or a mapping is somewhere in it; everything else is a leaf. Keys are
joined by dots. Held against torch's own `flatten_state_dict` in the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ckptd.protocol.errors import Unsupported

Path = tuple[str | int, ...]


def flatten(state_dict: Mapping[str, Any]) -> dict[str, tuple[Path, Any]]:
    """Return the leaves of a state dict by name, each with its path.

    Raises:
        Unsupported: Two paths have the same name, as ``{"a.b": ..., "a": {"b": ...}}`` does.
    """
    leaves: dict[str, tuple[Path, Any]] = {}
    for key, value in state_dict.items():
        _walk(leaves, str(key), (str(key),), value)
    return leaves


def top_level(state_dict: Mapping[str, Any]) -> dict[str, tuple[Path, Any]]:
    """Return the values of a state dict that is to be taken as it is, each with its path of one step.

    Raises:
        Unsupported: Two keys are spelt alike, as ``1`` and ``"1"`` are.
    """
    leaves: dict[str, tuple[Path, Any]] = {}
    for key, value in state_dict.items():
        _add(leaves, str(key), (str(key),), value)
    return leaves


def _walk(leaves: dict[str, tuple[Path, Any]], name: str, path: Path, value: Any) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            text = str(key)
            _walk(leaves, f"{name}.{text}", (*path, text), inner)
    elif isinstance(value, list) and _holds_more(value):
        for position, inner in enumerate(value):
            _walk(leaves, f"{name}.{position}", (*path, position), inner)
    else:
        _add(leaves, name, path, value)


def _add(leaves: dict[str, tuple[Path, Any]], name: str, path: Path, value: Any) -> None:
    if name in leaves:
        raise Unsupported(f"key {name!r} twice in one state dict", "rename one of the two")
    leaves[name] = (path, value)


def _holds_more(values: list[Any]) -> bool:
    return any(
        isinstance(value, torch.Tensor | Mapping) or (isinstance(value, list) and _holds_more(value))
        for value in values
    )


def set_leaf(state_dict: Any, path: Path, value: Any) -> None:
    """Put a value back where its path says, in the nested state dict it came from.

    A mapping whose keys are not text is searched for the key that is spelt so.
    """
    for step in path[:-1]:
        state_dict = state_dict[_key(state_dict, step)]
    state_dict[_key(state_dict, path[-1])] = value


def _key(container: Any, step: str | int) -> Any:
    if isinstance(step, int) or step in container:
        return step
    return next((key for key in container if str(key) == step), step)
