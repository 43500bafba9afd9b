"""What `ckptd ls` does. Loads neither typer nor torch, and reads no tensor: it takes a fraction of a second.

Measured: importing typer 0.29 and building its commands, for which it loads pydantic, takes 0.2 s of processor time;
all the rest of a listing takes as much.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ckptd.daemon.cli.output import complain, fault_facts, print_columns, printable, say, say_json
from ckptd.protocol.errors import CkptdError, UnknownCheckpoint

if TYPE_CHECKING:
    from ckptd.checkpoint.folder.user_data import UserData
    from ckptd.checkpoint.formats.source import Source
    from ckptd.checkpoint.formats.summary import Summary
    from ckptd.checkpoint.indexing.columns import Index

# Name, dtype, shape, bytes and number of chunks of an entry.
Row = tuple[str, str, tuple[int, ...], int, int]
Listed = tuple["Summary", list[Row] | None]


def list_paths(paths: Sequence[str], *, as_json: bool) -> int:
    """Print the checkpoints under folders, and the entries of checkpoints.

    Returns:
        The exit status: 1 if something is damaged or not there.
    """
    listed: list[Listed] = []
    faults: list[CkptdError] = []
    for path in paths:
        try:
            listed += _look(path)
        except CkptdError as error:
            faults.append(error)
    faults += [summary.fault for summary, _ in listed if summary.fault is not None]
    if as_json:
        checkpoints = [_facts(summary, rows) for summary, rows in listed]
        facts = {"checkpoints": checkpoints, "faults": [fault_facts(fault) for fault in faults]}
        say_json(facts)
    else:
        _print(listed)
        for fault in faults:
            complain(fault)
    return 1 if faults else 0


def _look(path: str) -> list[Listed]:
    """Return what lies at a path: one checkpoint with its entries, or many without."""
    from ckptd.checkpoint.formats.summary import find_checkpoints, is_checkpoint, summarise
    from ckptd.checkpoint.indexing.open import read_index

    if is_checkpoint(path):
        index = read_index(path)
        return [(summarise(path, index), rows_of(index))]
    if os.path.isdir(path):
        found: list[Listed] = [(summarise(each), None) for each in find_checkpoints(path)]
        if found:
            return found
    if not os.path.lexists(path):
        raise UnknownCheckpoint(path)
    return [_other(path)]


def rows_of(index: Index) -> list[Row]:
    """Return the entries of a checkpoint, in the order of the index."""
    import numpy as np

    from ckptd.staging.dtypes import DTYPES, OBJECT

    used = np.arange(index.shape.shape[1]) < index.ndim[:, None]
    elements = np.where(used, index.shape, 1).prod(axis=1).tolist()
    chunks = np.bincount(index.item_name, minlength=len(index.names)).tolist()
    rows: list[Row] = []
    columns = zip(index.names, index.dtype.tolist(), index.ndim.tolist(), index.shape.tolist(), strict=True)
    for row, (name, dtype, ndim, shape) in enumerate(columns):
        if dtype == OBJECT:
            rows.append((name, "object", (), 0, chunks[row]))
        else:
            nbytes = elements[row] * DTYPES[dtype].itemsize_bytes
            rows.append((name, DTYPES[dtype].name, tuple(shape[:ndim]), nbytes, chunks[row]))
    return rows


def _other(path: str) -> Listed:
    """Return what a file of another format holds, or a folder of safetensors files."""
    from ckptd.checkpoint.formats.convert import open_source

    with open_source(path) as source:
        rows = [(e.name, e.kind, e.shape, e.nbytes, len(e.boxes)) for e in source.entries]
        return _summary_of(source), rows


def _summary_of(source: Source) -> Summary:
    from ckptd.checkpoint.formats.convert import format_of
    from ckptd.checkpoint.formats.summary import State, Summary

    objects = sum(entry.is_object for entry in source.entries)
    nbytes = sum(entry.nbytes for entry in source.entries)
    changed, origin = os.stat(source.path).st_mtime, str(format_of(source.path))
    return Summary(source.path, origin, len(source.entries) - objects, objects, nbytes, changed, 0, State.COMPLETE)


def _facts(summary: Summary, rows: list[Row] | None) -> dict[str, Any]:
    facts: dict[str, Any] = {
        **{"path": summary.path, "origin": summary.origin, "state": str(summary.state), "bytes": summary.bytes},
        **{"tensors": summary.tensors, "objects": summary.objects, "world_size": summary.world_size},
        "saved_unix_s": summary.saved_unix_s,
        "pinned": summary.pinned,
        "user": user_facts(summary.user),
    }
    if rows is not None:
        facts["entries"] = [dict(zip(("name", "dtype", "shape", "bytes", "chunks"), row, strict=True)) for row in rows]
    return facts


def user_facts(user: UserData | None) -> dict[str, Any] | None:
    """Return what the user said of a checkpoint, as `--json` tells it."""
    if user is None:
        return None
    # JSON has no word for what diverged.
    metrics = {name: value if math.isfinite(value) else str(value) for name, value in user.metrics.items()}
    return {"step": user.step, "metrics": metrics, "metadata": user.metadata}


def _metrics(user: UserData | None) -> str:
    return "-" if user is None else " ".join(f"{name}={value:g}" for name, value in user.metrics.items()) or "-"


def _state(summary: Summary) -> str:
    return f"{summary.state}, pinned" if summary.pinned else str(summary.state)


def _print(listed: list[Listed]) -> None:
    alone = [summary for summary, rows in listed if rows is None]
    if alone:
        heads: tuple[str, ...] = ("CHECKPOINT", "BYTES", "TENSORS", "RANKS", "SAVED", "BY", "STATE")
        cells: list[tuple[object, ...]] = [
            (s.path, s.bytes, s.tensors, s.world_size or "-", _when(s), s.origin or "-", _state(s)) for s in alone
        ]
        if any(s.user is not None and s.user.metrics for s in alone):
            heads = (*heads, "METRICS")
            cells = [(*row, _metrics(s.user)) for row, s in zip(cells, alone, strict=True)]
        print_columns(heads, cells, right=("BYTES", "TENSORS", "RANKS"))
    for summary, rows in listed:
        if rows is not None:
            counts = f"{summary.tensors} tensors, {summary.objects} objects, {summary.bytes} bytes"
            say(printable(f"{summary.path}: {counts}, by {summary.origin}, {_when(summary)}, {summary.state}"))
            lines = [(name, dtype, _shape(shape), nbytes or "-") for name, dtype, shape, nbytes, _ in rows]
            print_columns(("NAME", "DTYPE", "SHAPE", "BYTES"), lines, right=("BYTES",))


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "-"


def _when(summary: Summary) -> str:
    if not summary.saved_unix_s:
        return "-"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(summary.saved_unix_s))
