"""What a state dict wants against what a checkpoint holds, key by key, before a byte is read. No I/O, no collective.

A pure function of the state dict's keys, shapes and dtypes and of the index: ranks whose state dicts are alike come to
the same result, error included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ckptd.checkpoint.indexing.columns import Index, KeyPath
from ckptd.checkpoint.planning.chunks import shape_of
from ckptd.checkpoint.stock.metadata import torch_dtype
from ckptd.client.loading.report import Difference
from ckptd.client.saving.flatten import Path
from ckptd.protocol.errors import Mismatch, MissingKeys, Unsupported
from ckptd.staging.dtypes import OBJECT

Leaves = Mapping[str, tuple[Path, Any]]
Strict = bool | Mapping[str, bool]


@dataclass(frozen=True, kw_only=True)
class LoadRules:
    """What a load puts up with.

    Attributes:
        strict: Whether a key that is missing or does not fit is an error; or that by prefix of the key, whole steps,
            the longest that fits; a key that fits none is strict.
        partial: Whether missing keys are never an error (DefaultLoadPlanner(allow_partial_load=True)).
        convert_dtype: Whether a tensor of another dtype is converted, as stock does; or does not fit.
    """

    strict: Strict = True
    partial: bool = False
    convert_dtype: bool = True

    def __post_init__(self) -> None:
        """Refuse what is neither a bool nor a mapping of bools: a misspelt one would let everything pass."""
        values = self.strict.values() if isinstance(self.strict, Mapping) else [self.strict]
        if not all(isinstance(value, bool) for value in values):
            raise Unsupported(f"strict={self.strict!r}", "give a bool, or a mapping of prefixes to bools")

    def is_strict(self, name: str) -> bool:
        """Return whether a key has to be loaded."""
        if isinstance(self.strict, bool):
            return self.strict
        while name:
            for prefix in (name, f"{name}."):
                if prefix in self.strict:
                    return self.strict[prefix]
            name = name.rpartition(".")[0]
        return self.strict.get("", True)


@dataclass(kw_only=True)
class Match:
    """The keys of a state dict, sorted by what becomes of them.

    Attributes:
        names: Those to be loaded, in the state dict's order.
        rows: Their positions among the index's names.
        missing: Not in the checkpoint and left alone.
        unexpected: In the checkpoint only.
        mismatched: Of another shape, kind or dtype, and left alone.
        converted: To be loaded and converted.
        absent_optimizer_state: Entries of parameters that have no optimizer state in the checkpoint.
    """

    names: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[Difference] = field(default_factory=list)
    converted: list[Difference] = field(default_factory=list)
    absent_optimizer_state: list[str] = field(default_factory=list)


def match(path: str, index: Index, leaves: Leaves, *, rules: LoadRules) -> Match:
    """Compare a state dict with a checkpoint.

    Args:
        path: Of the checkpoint, for errors.
        index: Of the checkpoint.
        leaves: Path and value by key; of tensors only shape and dtype are looked at.
        rules: What is let pass.

    Raises:
        MissingKeys: Strict keys are lacking: fix the state dict, or load with ``strict=False``.
        Mismatch: A strict key has another shape or kind, or another dtype that must not be converted.
    """
    row_of = {name: row for row, name in enumerate(index.names)}
    found = Match()
    absent = [name for name in leaves if name not in row_of]
    if absent:
        _sort_absent(path, index, leaves, absent, found=found, rules=rules)
    if len(row_of) > len(leaves) - len(absent):
        found.unexpected = [name for name in index.names if name not in leaves]
    present = [name for name in leaves if name in row_of] if absent else list(leaves)
    rows = [row_of[name] for name in present]
    _compare(index, leaves, present, rows, found=found, rules=rules)
    return found


def _sort_absent(
    path: str, index: Index, leaves: Leaves, absent: Sequence[str], *, found: Match, rules: LoadRules
) -> None:
    lazy = absent_state(leaves, absent, dict(zip(index.names, index.paths, strict=True)))
    found.absent_optimizer_state = [name for name in absent if name in lazy]
    found.missing = [name for name in absent if name not in lazy]
    refused = [] if rules.partial else [name for name in found.missing if rules.is_strict(name)]
    if refused:
        raise MissingKeys(path, len(refused), refused[0])


def _compare(
    index: Index, leaves: Leaves, names: Sequence[str], rows: Sequence[int], *, found: Match, rules: LoadRules
) -> None:
    codes, ndims, shapes = index.dtype[rows].tolist(), index.ndim[rows].tolist(), index.shape[rows].tolist()
    dtypes = {code: torch_dtype(code) for code in set(codes) - {OBJECT}}
    for name, row, code, ndim, shape in zip(names, rows, codes, ndims, shapes, strict=True):
        value = leaves[name][1]
        if code == OBJECT:
            fits = not isinstance(value, torch.Tensor)
        else:
            fits = isinstance(value, torch.Tensor) and shape_of(value) == tuple(shape[:ndim])
        if fits and (code == OBJECT or value.dtype is dtypes[code]):
            found.names.append(name)
            found.rows.append(row)
            continue
        other = _difference(name, value, dtypes.get(code), tuple(shape[:ndim]))
        if fits and rules.convert_dtype:
            found.names.append(name)
            found.rows.append(row)
            found.converted.append(other)
        elif rules.is_strict(name):
            raise Mismatch(name, other.wanted, other.stored)
        else:
            found.mismatched.append(other)


def _difference(name: str, value: Any, dtype: torch.dtype | None, shape: tuple[int, ...]) -> Difference:
    is_tensor = isinstance(value, torch.Tensor)
    if dtype is None:
        return Difference(name, f"shape {shape_of(value)}", "an object")
    if not is_tensor:
        return Difference(name, f"an object of type {type(value).__name__}", f"a tensor of shape {shape}")
    if shape_of(value) != shape:
        return Difference(name, f"shape {shape_of(value)}", f"shape {shape}")
    return Difference(name, f"dtype {value.dtype}", f"dtype {dtype}")


# --- optimizer state that never existed ------------------------------------------------------------------------------


def absent_state(leaves: Leaves, absent: Sequence[str], stored: Mapping[str, KeyPath]) -> set[str]:
    """Return which absent keys are optimizer state that never existed: their parameter has none at all.

    torch's optimizers make a parameter's state when they first step it: frozen and unused parameters have none. A
    parameter with a part of its state is no such case, and neither is a checkpoint that lacks the whole optimizer.

    Args:
        leaves: Path and value by key, of the whole state dict.
        absent: Keys that the checkpoint lacks.
        stored: Paths of the checkpoint's keys, by key.
    """
    wanted = {name: leaves[name][0] for name in leaves}
    stateful = _parameters_of(stored)
    groups = _optimizers_of(wanted) | _optimizers_of(stored)
    known = {optimizer for optimizer, _ in stateful} | _optimizers_of(stored)
    lazy = set()
    for name in absent:
        parameter = _parameter_of(name, leaves[name][0])
        if parameter is None or parameter in stateful or parameter[0] not in known:
            continue
        if parameter[0] in groups or "opt" in parameter[0].lower():
            lazy.add(name)
    return lazy


def _parameter_of(name: str, path: KeyPath) -> tuple[str, str] | None:
    """Return optimizer and parameter that a key is state of: ``o.state.w.exp_avg`` is of ``o`` and ``w``.

    A parameter is one step of the path, whatever dots it holds; in a flat state dict all from ``state`` to the entry.
    """
    if "state" in path[:-2]:
        at = path.index("state")
        return ".".join(map(str, path[:at])), str(path[at + 1])
    optimizer, found, rest = f".{name}".partition(".state.")
    parameter = rest.rpartition(".")[0]
    return (optimizer[1:], parameter) if found and parameter else None


def _parameters_of(paths: Mapping[str, KeyPath]) -> set[tuple[str, str]]:
    return {parameter for name, path in paths.items() if (parameter := _parameter_of(name, path)) is not None}


def _optimizers_of(paths: Mapping[str, KeyPath]) -> set[str]:
    """Return what has parameter groups, as every optimizer of torch has: ``o.param_groups.0.lr`` is of ``o``."""
    return {
        optimizer[1:] for name in paths for optimizer, found, _ in [f".{name}.".partition(".param_groups.")] if found
    }
