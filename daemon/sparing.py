"""Keeps answers that cost time from taking the event loop away from saves, however often they are asked for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

# A fresh answer is made when the last one was made at least so many times its own duration ago: answers take at most
# a fifth of the loop's time. A scrape that takes 3 ms is then at most 12 ms old.
_PAUSE_FACTOR: Final = 4


class Sparing:
    """Answers of some kinds; a kind is one of a few names, never what a request brings.

    Args:
        clock: Returns seconds that never run backwards.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._last: dict[str, bytes] = {}
        self._fresh_from_s = 0.0

    def answer(self, kind: str, make: Callable[[], bytes]) -> bytes:
        """Return a fresh answer, or the last of its kind while making fresh ones would take too much time."""
        begun_s = self._clock()
        if kind in self._last and begun_s < self._fresh_from_s:
            return self._last[kind]
        made = self._last[kind] = make()
        ended_s = self._clock()
        self._fresh_from_s = ended_s + _PAUSE_FACTOR * (ended_s - begun_s)
        return made
