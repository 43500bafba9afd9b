"""Keeps answers that cost time from taking the event loop away from saves, however often they are asked for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

# Whoever scrapes, looks and waits at a usual pace always gets a fresh answer: credit for some hundred of them is there,
# and grows again by a fifth of the time that passes. A flood takes a fifth of the loop's time at most.
_CREDIT_S: Final = 1.0
_SHARE: Final = 0.2


class Sparing:
    """Answers of some kinds; a kind is one of a few names, never what a request brings.

    Args:
        clock: Returns seconds that never run backwards.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._last: dict[str, bytes] = {}
        self._credit_s, self._counted_at_s = _CREDIT_S, clock()

    def answer(self, kind: str, make: Callable[[], bytes]) -> bytes:
        """Return a fresh answer, or the last of its kind while the time for fresh ones is used up."""
        begun_s = self._clock()
        self._credit_s = min(_CREDIT_S, self._credit_s + _SHARE * (begun_s - self._counted_at_s))
        self._counted_at_s = begun_s
        if kind in self._last and self._credit_s <= 0:
            return self._last[kind]
        made = self._last[kind] = make()
        self._credit_s -= self._clock() - begun_s
        return made
