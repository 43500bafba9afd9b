"""Loads of the newest good checkpoint: which of several it is, on all ranks alike.

A checkpoint is verified, by all ranks together and each a share of it, before the first byte of a target is touched:
what is passed over leaves no trace in the state dict. Rank 0 alone lists the folder; ranks compare notes through the
process group's store (:mod:`ckptd.client.session.exchange`) and run no collective. Ranks without a store decide each
alone, and each reads all of it: they come to the same result as long as the file system shows all of them the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from ckptd.checkpoint.folder.catalog import list_entries, look_at
from ckptd.checkpoint.folder.locks import reading
from ckptd.checkpoint.folder.steps import step_of
from ckptd.checkpoint.verify import verify_checkpoint
from ckptd.client.loading.report import LoadReport, PassedOver
from ckptd.client.logging_handlers import note
from ckptd.client.session.exchange import Exchange, Patience, Place
from ckptd.protocol.errors import (
    CkptdError,
    ErrorReport,
    NoGoodCheckpoint,
    StorageError,
    UnknownCheckpoint,
    from_report,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """Where to look.

    Attributes:
        path: Told in errors.
        candidates: Lists the checkpoints, the most wanted first.
        verified: Whether they are verified ahead, and damaged ones passed over; or the first is loaded as it is.
    """

    path: str
    candidates: Callable[[], list[str]]
    verified: bool = True


def candidates_at(path: str) -> list[str]:
    """Return the checkpoints that may be meant by a path, the newest first, damaged ones among them.

    Args:
        path: A folder of checkpoints; or one of them, and then the older ones in its folder come behind it if its name
            tells a step.

    Raises:
        SystemCallFailed: The folder cannot be read.
    """
    step = step_of(os.path.basename(path))
    inside = [] if look_at(path) is not None else list_entries(path)
    if inside or step is None:
        return [entry.path for entry in inside] or [path]
    siblings = [entry for entry in list_entries(os.path.dirname(path)) if entry.path != path]
    return [path, *(entry.path for entry in siblings if entry.step is not None and entry.step < step)]


def load_newest_good(
    wanted: Wanted, load: Callable[[str], LoadReport], *, place: Place, patience: Patience | None = None
) -> LoadReport | None:
    """Load the first candidate that is good.

    Args:
        wanted: Where to look.
        load: Loads the checkpoint in a directory.
        place: This process among the ranks that load.
        patience: How long ranks wait for each other.

    Returns:
        What ``load`` returned, with what was passed over put in; None if there is no candidate.

    Raises:
        UnknownCheckpoint: The only candidate is no checkpoint.
        NoGoodCheckpoint: There are some, and all are damaged. Nothing was touched.
        RankFailed, DeadlineExceeded: A rank did not come, or went away.
        CkptdError: What ``load`` raises, of the checkpoint that was chosen.
    """
    passed_over: list[PassedOver] = []
    fault: CkptdError | None = None
    with contextlib.ExitStack() as held:
        with Exchange(place, patience=patience) as exchange:
            candidates = _agreed_list(exchange, wanted)
            for number, path in enumerate(candidates):
                begun = time.monotonic()
                with contextlib.ExitStack() as attempt:
                    attempt.enter_context(reading(path))
                    fault = _agreed_fault(exchange, number, path) if wanted.verified else None
                    if fault is None:
                        held.push(attempt.pop_all())
                        break
                passed_over.append(PassedOver(path, str(fault)))
                logger.warning("passed over %s: %s", path, fault)
                note("load", "fallback", path, exchange.rank, time.monotonic() - begun, error=fault)
            else:
                if not candidates:
                    return None
                if len(candidates) == 1 and isinstance(fault, UnknownCheckpoint):
                    raise fault
                told = "; ".join(f"{os.path.basename(one.path)}: {one.reason}" for one in passed_over[:3])
                raise NoGoodCheckpoint(wanted.path, len(passed_over), told)
        if passed_over:
            logger.warning("loading %s, after %d damaged ones", path, len(passed_over))
        return dataclasses.replace(load(path), passed_over=tuple(passed_over))


def _agreed_list(exchange: Exchange, wanted: Wanted) -> list[str]:
    """Return the candidates as rank 0 sees them."""

    def answer(parts: list[bytes]) -> list[bytes]:
        return [msgspec.json.encode(wanted.candidates())] * len(parts)

    return msgspec.json.decode(exchange.together("listing", lambda: b"", answer), type=list[str])


def _agreed_fault(exchange: Exchange, number: int, path: str) -> CkptdError | None:
    """Return what is wrong with a checkpoint, as the first rank that found something says; None if it is good."""

    def look() -> bytes:
        fault = _fault(path, (exchange.rank, exchange.world_size))
        return b"" if fault is None else msgspec.json.encode(fault.report())

    def answer(parts: list[bytes]) -> list[bytes]:
        return [next(filter(None, parts), b"")] * len(parts)

    told = exchange.together(f"verifying {number}", look, answer)
    return from_report(msgspec.json.decode(told, type=ErrorReport)) if told else None


def _fault(path: str, share: tuple[int, int]) -> CkptdError | None:
    """Return what is wrong with this rank's share of a checkpoint."""
    try:
        report = verify_checkpoint(path, share=share)
    except (StorageError, UnknownCheckpoint) as error:
        return error
    return report.faults[0] if report.faults else None
