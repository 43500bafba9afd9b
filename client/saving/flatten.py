"""Nested state dicts as flat ones, with torch.distributed.checkpoint's names.

Mappings are walked; a list is walked if a tensor or a mapping is somewhere in it; everything else is a leaf. Keys are
joined by dots. Held against torch's own `flatten_state_dict` in the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from ckptd.protocol.errors import Unsupported

Path = tuple[str | int, ...]

# What is a leaf without a second look.
_LEAVES: Final = frozenset({torch.Tensor, torch.nn.Parameter, int, float, bool, str, bytes, type(None)})


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
    elif _is_walked(value):
        for position, inner in enumerate(value):
            _walk(leaves, f"{name}.{position}", (*path, position), inner)
    else:
        _add(leaves, name, path, value)


def _add(leaves: dict[str, tuple[Path, Any]], name: str, path: Path, value: Any) -> None:
    if name in leaves:
        raise Unsupported(f"key {name!r} twice in one state dict", "rename one of the two")
    leaves[name] = (path, value)


@dataclass(frozen=True, slots=True)
class Outline:
    """The containers of a nested state dict: a mapping's keys (None: a list), and what is under each (None: a leaf).

    With it the leaves of a state dict that has not changed are found in a fifth of the time of :func:`flatten`.
    """

    kind: type[Any]
    keys: tuple[str, ...] | None
    under: tuple[Outline | None, ...]

    def leaves_of(self, state_dict: Any) -> list[Any] | None:
        """Return the leaves in the order of :func:`flatten`; None if the state dict has another outline."""
        found: list[Any] = []
        return found if self._collect(state_dict, found) else None

    def _collect(self, container: Any, found: list[Any]) -> bool:
        if type(container) is not self.kind or len(container) != len(self.under):
            return False
        if self.keys is not None and tuple(container) != self.keys:
            return False
        for value, outline in zip(container if self.keys is None else container.values(), self.under, strict=True):
            if outline is not None:
                if not outline._collect(value, found):
                    return False
            elif type(value) in _LEAVES or not _is_walked(value):
                found.append(value)
            else:
                return False
        return True


def outline_of(state_dict: Any) -> Outline | None:
    """Return the outline of a state dict; None if it has keys that are not text, which :func:`flatten` spells out."""
    if isinstance(state_dict, Mapping):
        keys: tuple[str, ...] | None = tuple(state_dict)
        values = list(state_dict.values())
        if any(type(key) is not str for key in keys or ()):
            return None
    else:
        keys, values = None, state_dict
    under = [outline_of(value) if _is_walked(value) else None for value in values]
    if any(outline is None and _is_walked(value) for outline, value in zip(under, values, strict=True)):
        return None
    return Outline(type(state_dict), keys, tuple(under))


def _is_walked(value: Any) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, list) and _holds_more(value))


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
