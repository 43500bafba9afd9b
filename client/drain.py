"""``drain``: waits for the saves of this process before it leaves, and tells what became of them."""

from __future__ import annotations

import concurrent.futures
import time
from dataclasses import dataclass
from typing import Literal

from ckptd.client.saving.futures import SaveFuture, open_saves
from ckptd.protocol.errors import CkptdError, Unsupported


@dataclass(frozen=True)
class DrainReport:
    """What became of the saves that were under way.

    Attributes:
        committed: Checkpoints that are durable and visible.
        staged: Those that the daemon has and is still writing: this process may leave, they will be finished, provided
            that the other ranks have staged their parts as well.
        unstaged: Those whose tensors are not all staged yet: they are lost if this process leaves.
        failed: Those that failed, each with the cause.
        seconds: How long it took.
    """

    committed: tuple[str, ...]
    staged: tuple[str, ...]
    unstaged: tuple[str, ...]
    failed: tuple[tuple[str, CkptdError], ...]
    seconds: float

    @property
    def safe(self) -> bool:
        """Whether this process can leave without losing a checkpoint."""
        return not (self.unstaged or self.failed)


def drain(deadline_s: float, *, until: Literal["committed", "staged"] = "committed") -> DrainReport:
    """Wait until the saves of this process that are under way have come to an end, at most so long.

    Args:
        deadline_s: How long, in seconds; at most a week. What is staged by then is finished by the daemon, whatever
            becomes of this process.
        until: ``"committed"``: wait for commits; ``"staged"``: be content with what the daemon has.

    Returns:
        What became of each.
    """
    if not 0 <= deadline_s <= 7 * 86_400:
        raise Unsupported(f"deadline_s={deadline_s}", "give seconds, at least 0 and at most a week")
    if until not in {"committed", "staged"}:
        raise Unsupported(f"until={until!r}", "give 'committed' or 'staged'")
    begun = time.monotonic()
    saves = open_saves()
    waited = [save if until == "committed" else save.staging_completion for save in saves]
    concurrent.futures.wait(waited, timeout=deadline_s)
    return _report(saves, time.monotonic() - begun)


def _report(saves: list[SaveFuture], seconds: float) -> DrainReport:
    states = [(save, save.state) for save in saves]
    failed = [(save.checkpoint_id, save.exception()) for save, state in states if state == "failed"]
    return DrainReport(
        tuple(save.checkpoint_id for save, state in states if state == "committed"),
        tuple(save.checkpoint_id for save, state in states if state == "staged"),
        tuple(save.checkpoint_id for save, state in states if state == "scheduled"),
        tuple((path, error) for path, error in failed if isinstance(error, CkptdError)),
        seconds,
    )
