"""How the generations of a job ended: what is told again to a rank that asks, and the last commit's image in memory.

Invariant: at most one generation is retained, the last one committed, and only while its slots are nobody's.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

from ckptd.daemon.job.generation import Generation
from ckptd.daemon.recovery.job_log import JobLog
from ckptd.protocol.errors import ErrorReport

_HISTORY: Final = 32
# A rank that lags may speak of a save that has ended; more than a few saves behind, its slots would be busy.
_VERDICTS: Final = 256
# The metadata of a hand-over may be large, and is asked for by ranks whose slots the save took: a few.
_METADATA: Final = 8


@dataclass(frozen=True)
class Verdict:
    """How a generation ended. ``error`` is None where it was committed."""

    save_id: str
    error: ErrorReport | None
    metadata: bytes = b""


class Outcomes:
    """The ended generations of one job.

    Args:
        log: The job's part of the journal.
    """

    def __init__(self, log: JobLog) -> None:
        self._log = log
        self.history: deque[dict[str, object]] = deque(maxlen=_HISTORY)
        self.verdicts: dict[tuple[int, int], Verdict] = {}
        self.retained: Generation | None = None

    @property
    def retained_arenas(self) -> set[int]:
        """Numbers of the arenas that hold the image of the last commit, as long as nobody has staged over it."""
        retained = self.retained
        return set() if retained is None else {seal.arena.number for seal in retained.seals.values()}

    def end(self, generation: Generation, *, retain: bool) -> None:
        """Note how a generation ended.

        Args:
            generation: One that is decided.
            retain: Keep its image in its slots until they are needed, if it was committed.
        """
        if not generation.dry:
            self.history.append(generation.status())
        self._remember(generation)
        if not retain or generation.rules.error is not None or not lies_whole_in_slots(generation):
            self._log.over(generation)
            return
        generation.forget_work()
        self.retain(generation)

    def retain(self, generation: Generation) -> None:
        """Keep the image of this one in memory, and no other any more."""
        older, self.retained = self.retained, generation
        if older is not None:
            self._log.over(older)

    def drop_retained(self) -> bool:
        """The memory is wanted. Return whether there was one."""
        retained, self.retained = self.retained, None
        if retained is not None:
            self._log.over(retained)
        return retained is not None

    def _remember(self, generation: Generation) -> None:
        error = generation.rules.error
        verdict = Verdict(generation.save_id, None if error is None else error.report(), generation.metadata)
        self.verdicts[generation.incarnation, generation.sequence] = verdict
        while len(self.verdicts) > _VERDICTS:
            oldest = next(iter(self.verdicts))
            del self.verdicts[oldest]
            self._log.forget_verdict(*oldest)
        for key in [key for key, kept in self.verdicts.items() if kept.metadata][:-_METADATA]:
            self.verdicts[key] = Verdict(self.verdicts[key].save_id, None)
            self._log.forget_verdict(*key)


def lies_whole_in_slots(generation: Generation) -> bool:
    """Return whether every rank's image can be read from memory: not one that came in waves, or was handed over."""
    seals = [seal.message for seal in generation.seals.values()]
    return bool(seals) and not any(seal.code_bytes or seal.wave_bytes for seal in seals)
