"""When each phase of one save began and ended, over all its ranks. Rules without I/O.

Phases are told when they end, with how long they took; ranks overlap, so a span reaches from the first beginning to
the last end.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ckptd.daemon.monitoring.labels import Phase


@dataclass
class Timeline:
    """The phases of one save.

    Args:
        clock: Returns seconds that never run backwards.
    """

    clock: Callable[[], float] = time.monotonic
    _spans: dict[Phase, tuple[float, float]] = field(default_factory=dict)
    _seals: dict[int, float] = field(default_factory=dict)
    _write_began_s: float | None = None
    _begun_s: float = field(init=False)

    def __post_init__(self) -> None:
        """Begin now."""
        self._begun_s = self.clock()

    def took(self, phase: Phase, seconds: float, *, ended_ago_s: float = 0.0) -> None:
        """One rank's phase has ended.

        Args:
            phase: Which.
            seconds: How long it took.
            ended_ago_s: How long ago it ended, in seconds.
        """
        end = self.clock() - ended_ago_s
        begin = end - seconds
        if phase == "write" and begin < (self._write_began_s or end):
            self._write_began_s = begin  # an image that came in waves is told of when the last one is written
        known = self._spans.get(phase)
        self._spans[phase] = (begin, end) if known is None else (min(begin, known[0]), max(end, known[1]))

    def writing_began(self) -> None:
        """A worker took up the first, or another, image."""
        if self._write_began_s is None:
            self._write_began_s = self.clock()

    def sealed(self, rank: int) -> None:
        """A rank's image is complete."""
        self._seals.setdefault(rank, self.clock())

    def slowest(self) -> tuple[int, float] | None:
        """Return the rank that sealed last, and by how many seconds after the first; None with fewer than two."""
        if len(self._seals) < 2:
            return None
        rank = max(self._seals, key=lambda rank: self._seals[rank])
        return rank, self._seals[rank] - min(self._seals.values())

    @property
    def writing_s(self) -> float:
        """Seconds from the first write to the last fsync, or until now while nothing is durable; 0 before it began."""
        if self._write_began_s is None:
            return 0.0
        _, end = self._spans.get("fsync", (0.0, self.clock()))
        return max(0.0, end - self._write_began_s)

    def rate(self, nbytes: int, *, running: bool) -> float | None:
        """Return bytes per second over the time of writing; None where nothing was written.

        Args:
            nbytes: What has been written.
            running: Whether images are still being written: then the time is counted until now.
        """
        if self._write_began_s is None or not nbytes:
            return None
        seconds = self.clock() - self._write_began_s if running else self.writing_s
        return nbytes / seconds if seconds > 0 else None

    def status(self) -> list[dict[str, object]]:
        """Return the spans in the order in which they began; ``begin_s`` counts from the first thing known."""
        first = min([self._begun_s, *(begin for begin, _ in self._spans.values())])
        spans = sorted(self._spans.items(), key=lambda item: item[1])
        return [{"phase": phase, "begin_s": begin - first, "seconds": end - begin} for phase, (begin, end) in spans]
