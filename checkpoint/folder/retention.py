"""Which checkpoints may be removed: the rules, without I/O.

Invariant: what is latest, by step or by the time of its commit, what is pinned, busy, not committed, or not saved by a
checkpoint manager is never chosen. Only what may be chosen is counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ckptd.checkpoint.folder.catalog import CatalogEntry
from ckptd.protocol.retention_messages import Keep


def choose_removals(entries: Sequence[CatalogEntry], keep: Keep, *, busy: Iterable[str] = ()) -> list[CatalogEntry]:
    """Return what no rule keeps, the oldest first.

    Args:
        entries: All that lies in the folder.
        keep: What is to be kept.
        busy: Names of checkpoints that are being saved.
    """
    counted = [entry for entry in entries if entry.managed and entry.complete]
    if keep.last is None or not counted:
        return []  # no limit
    by_age = sorted(counted, key=_age, reverse=True)
    kept = {entry.path for entry in by_age[: max(keep.last, 1)]}
    kept.add(max(by_age, key=lambda entry: entry.committed_unix_s).path)  # of equal ones the one with the higher step
    kept |= {entry.path for entry in best_first(counted, keep.metric, mode=keep.mode)[: keep.best]}
    if keep.every_steps:
        kept |= {entry.path for entry in counted if (entry.step or 0) % keep.every_steps == 0}
    in_flight = set(busy)
    free = [e for e in by_age if e.path not in kept and not e.pinned and e.name not in in_flight]
    return free[::-1]


def best_first(entries: Iterable[CatalogEntry], metric: str, *, mode: str) -> list[CatalogEntry]:
    """Return those that have a metric, the best first; of equal ones the newest. NaN is no value.

    Args:
        entries: Some checkpoints.
        metric: Name of the metric.
        mode: "min" or "max": which values are good.
    """
    sign = 1.0 if mode == "min" else -1.0
    valued = [(value, entry) for entry in entries if (value := _value(entry, metric)) is not None]
    newest = sorted(valued, key=lambda pair: _age(pair[1]), reverse=True)
    return [entry for _, entry in sorted(newest, key=lambda pair: sign * pair[0])]


def _age(entry: CatalogEntry) -> tuple[int, float]:
    return (-1 if entry.step is None else entry.step, entry.committed_unix_s)


def _value(entry: CatalogEntry, metric: str) -> float | None:
    value = None if entry.user is None or not metric else entry.user.metrics.get(metric)
    return None if value is None or math.isnan(value) else value
