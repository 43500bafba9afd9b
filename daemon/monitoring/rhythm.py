"""How regularly one job commits. Rules without I/O."""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Final

# Enough that one slow save, or a restart between two, does not move the median.
_REMEMBERED: Final = 8


class Rhythm:
    """The rhythm of one job's commits; times are seconds that never run backwards."""

    def __init__(self) -> None:
        self._intervals: deque[float] = deque(maxlen=_REMEMBERED)
        self._last_s: float | None = None

    def committed(self, now_s: float) -> float | None:
        """Note a commit and return the seconds since the one before, if there was one."""
        interval = None if self._last_s is None else now_s - self._last_s
        if interval is not None:
            self._intervals.append(interval)
        self._last_s = now_s
        return interval

    @property
    def interval_s(self) -> float | None:
        """The median of the last intervals, in seconds; None before the second commit."""
        return median(self._intervals) if self._intervals else None

    def lateness(self, now_s: float) -> float | None:
        """Return the age of the last commit in intervals: 1 is on time; None before the second commit."""
        interval = self.interval_s
        if self._last_s is None or not interval:
            return None
        return max(0.0, now_s - self._last_s) / interval
