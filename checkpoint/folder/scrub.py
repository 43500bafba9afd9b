"""Verifies every checkpoint below a folder, ours and stock's. What is unfinished is reported and not judged."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ckptd.checkpoint.formats.summary import State, find_checkpoints, summarise
from ckptd.checkpoint.verify import THREADS, VerifyReport, verify_checkpoint
from ckptd.protocol.errors import CkptdError


@dataclass(frozen=True)
class Scrubbed:
    """What was found of one checkpoint.

    Attributes:
        path: Its directory.
        state: "good", "damaged"; "unfinished" for a save under way, or one that died; or "gone" for one that was
            removed after it had been found. The last two are not judged.
        faults: What is wrong with a damaged one.
        report: What was read; None where nothing was.
    """

    path: str
    state: str
    faults: tuple[CkptdError, ...] = ()
    report: VerifyReport | None = None


def scrub(
    folder: str, *, threads: int = THREADS, progress: Callable[[int, int], None] | None = None
) -> Iterator[Scrubbed]:
    """Verify the checkpoints below a folder, one after the other.

    Args:
        folder: Where to look; a checkpoint itself will do.
        threads: How many read and hash at a time.
        progress: Called with bytes done and bytes in all, over all checkpoints.

    Yields:
        What was found of each, in the order of their names.

    Raises:
        SystemCallFailed: A folder cannot be read.
    """
    found = [(path, summarise(path)) for path in find_checkpoints(folder)]
    total_bytes = sum(summary.bytes for _, summary in found)
    done_bytes = 0
    for path, summary in found:
        if progress is not None:
            progress(done_bytes, total_bytes)
        if summary.state is State.UNFINISHED:
            yield Scrubbed(path, "unfinished")
        else:
            yield _scrubbed(path, threads, _beyond(progress, done_bytes, total_bytes))
        done_bytes += summary.bytes


def _scrubbed(path: str, threads: int, progress: Callable[[int, int], None] | None) -> Scrubbed:
    try:
        report = verify_checkpoint(path, threads=threads, progress=progress)
    except CkptdError as error:  # nothing to compare with: as damaged as can be, unless it was removed meanwhile
        return Scrubbed(path, "damaged" if os.path.lexists(path) else "gone", (error,))
    if report.good:
        return Scrubbed(path, "good", (), report)
    return Scrubbed(path, "damaged" if os.path.lexists(path) else "gone", report.faults, report)


def _beyond(
    progress: Callable[[int, int], None] | None, before_bytes: int, total_bytes: int
) -> Callable[[int, int], None] | None:
    """Return the progress of one checkpoint as a part of all."""
    if progress is None:
        return None
    return lambda done_bytes, _: progress(min(before_bytes + done_bytes, total_bytes), total_bytes)
