"""What lies in a folder: its checkpoints, and of each what can be told without reading a tensor. Knows no torch."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np

from ckptd.checkpoint.folder.pins import is_pinned
from ckptd.checkpoint.folder.user_data import UserData, decode_user_data
from ckptd.checkpoint.indexing.columns import Index
from ckptd.checkpoint.indexing.open import read_index
from ckptd.checkpoint.names import INDEX_NAME, METADATA_NAME, unfinished_save
from ckptd.checkpoint.system import named
from ckptd.protocol.errors import CkptdError, MissingFile, TruncatedFile
from ckptd.staging.dtypes import OBJECT

_IMAGE: Final = re.compile(r"__(\d+)_\d+\.distcp")


class State(StrEnum):
    """Whether a checkpoint can be used, as far as can be told without reading it."""

    COMPLETE = "complete"
    UNFINISHED = "unfinished"  # a save under way, or one that died
    DAMAGED = "damaged"


@dataclass(frozen=True)
class Summary:
    """One checkpoint.

    Attributes:
        path: Its directory.
        origin: "ckptd", "ckptd convert" or "torch.distributed.checkpoint"; "" where that is not known.
        tensors: Number of tensors.
        objects: Number of entries that are no tensors.
        bytes: Size of its files.
        saved_unix_s: When index or metadata were written, in seconds since 1970; 0 where there are none.
        world_size: Number of ranks that saved it; 0 where that is not known.
        state: Whether all its files are there.
        fault: What is wrong with a damaged one, or None.
        user: What its user said of it, or None.
        pinned: Whether retention leaves it alone.
    """

    path: str
    origin: str
    tensors: int
    objects: int
    bytes: int
    saved_unix_s: float
    world_size: int
    state: State
    fault: CkptdError | None = None
    user: UserData | None = None
    pinned: bool = False


def is_checkpoint(path: str) -> bool:
    """Return whether a directory has an index or metadata."""
    return any(os.path.lexists(os.path.join(path, name)) for name in (INDEX_NAME, METADATA_NAME))


def find_checkpoints(folder: str) -> Iterator[str]:
    """Yield the checkpoints under a folder, finished or not, in the order of their names; links are not followed.

    Raises:
        SystemCallFailed: The folder cannot be read.
    """

    def listed(path: str) -> list[os.DirEntry[str]]:
        with os.scandir(path) as found:
            return sorted(found, key=lambda entry: _natural(entry.name))

    waiting = [folder]
    while waiting:
        at = waiting.pop()
        entries = named("scandir", at, lambda at=at: listed(at))  # type: ignore[misc]  # mypy cannot infer the default
        names = {entry.name for entry in entries}
        if names & {INDEX_NAME, METADATA_NAME} or any(_IMAGE.fullmatch(name) for name in names):
            yield at
            continue
        below = [entry for entry in entries if entry.is_dir(follow_symlinks=False)]
        waiting += [e.path for e in reversed(below) if not e.name.startswith(".") or unfinished_save(e.name)]


def summarise(path: str, index: Index | None = None) -> Summary:
    """Return what can be told of a checkpoint, whole or not; never raises for what is wrong with it.

    Args:
        path: Its directory.
        index: Its index, if it was read already.
    """
    saved = max((_stat(os.path.join(path, name))[1] for name in (INDEX_NAME, METADATA_NAME)), default=0.0)
    if unfinished_save(os.path.basename(os.path.abspath(path))) or not is_checkpoint(path):
        return _unread(path, saved, State.UNFINISHED)
    try:
        index = read_index(path) if index is None else index
    except CkptdError as error:
        return _unread(path, saved, State.DAMAGED, error)
    objects = int((index.dtype == OBJECT).sum())
    sizes = [_stat(os.path.join(path, file))[0] for file in index.files]
    fault = _fault(index, path, sizes)
    own = sum(max(_stat(os.path.join(path, name))[0], 0) for name in (INDEX_NAME, METADATA_NAME))
    return Summary(
        path,
        origin_of(index),
        len(index.names) - objects,
        objects,
        sum(max(size, 0) for size in sizes) + own,
        saved,
        world_size_of(index),
        State.DAMAGED if fault else State.COMPLETE,
        fault,
        decode_user_data(index.header),
        is_pinned(path),
    )


def origin_of(index: Index) -> str:
    """Return what wrote a checkpoint."""
    return index.header.get("origin", "ckptd")


def world_size_of(index: Index) -> int:
    """Return how many ranks saved a checkpoint: as it says, or else as its files are named."""
    told = index.header.get("world_size", "")
    if told.isdigit():
        return int(told)
    return max((int(found[1]) + 1 for file in index.files if (found := _IMAGE.fullmatch(file))), default=0)


def _fault(index: Index, path: str, sizes: list[int]) -> CkptdError | None:
    """Return the first file that is missing or too short."""
    ends = np.zeros(len(index.files), np.int64)
    np.maximum.at(ends, index.item_file, index.record_offset + index.record_bytes)
    for file, size, end in zip(index.files, sizes, ends.tolist(), strict=True):
        if size < 0:
            return MissingFile(os.path.join(path, file))
        if size < end:
            return TruncatedFile(os.path.join(path, file), end, size)
    return None


def _unread(path: str, saved: float, state: State, fault: CkptdError | None = None) -> Summary:
    with contextlib.suppress(OSError):
        nbytes = sum(max(_stat(os.path.join(path, name))[0], 0) for name in os.listdir(path))
        return Summary(path, "", 0, 0, nbytes, saved, 0, state, fault)
    return Summary(path, "", 0, 0, 0, saved, 0, state, fault)


def _stat(path: str) -> tuple[int, float]:
    """Return a file's size in bytes and when it was changed; -1 and 0 where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, 0.0
    return status.st_size, status.st_mtime


def _natural(name: str) -> list[tuple[int, str]]:
    """Return by what names are sorted, step-9 before step-10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
