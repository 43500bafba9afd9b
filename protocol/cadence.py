"""When a checkpoint is due: by steps, by time, or both. Without I/O: the clock is an argument."""

from __future__ import annotations


class Cadence:
    """When the next checkpoint is due.

    Args:
        every_steps: Steps that are multiples of it are due; None: none is for that reason.
        every_s: A step is due so many seconds after the last save was begun; None: none is for that reason. With
            neither, every step is due.
        now_s: The time, in seconds of any clock.
    """

    def __init__(self, *, every_steps: int | None, every_s: float | None, now_s: float) -> None:
        self._every_steps, self._every_s = every_steps, every_s
        self._saved_at_s = now_s
        self._last_step = -1

    @property
    def last_step(self) -> int:
        """The step that was saved, or resumed from, last; -1 if there is none."""
        return self._last_step

    def due(self, step: int, now_s: float) -> bool:
        """Return whether a step is due; what was saved already is not."""
        if not self.is_new(step):
            return False
        if self._every_steps is None and self._every_s is None:
            return True
        by_step = self._every_steps is not None and step % self._every_steps == 0
        return by_step or (self._every_s is not None and now_s - self._saved_at_s >= self._every_s)

    def is_new(self, step: int) -> bool:
        """Return whether a step comes after what was saved or resumed from."""
        return step > self._last_step

    def note_saved(self, step: int, now_s: float) -> None:
        """A save of a step has begun, or training has resumed from it: from now on later steps are due."""
        self._last_step, self._saved_at_s = step, now_s
