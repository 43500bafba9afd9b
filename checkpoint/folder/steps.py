"""Names of checkpoints that tell their step, and which of several checkpoints is the newest. Pure text and order."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, Protocol, TypeVar

# A word or words, and a number: step-1000, step_1000, global_step1000, iter_0000100, 1000. Nothing may follow it:
# step-1000-broken is somebody's own.
_NUMBERED: Final = re.compile(r"(?:[A-Za-z]+(?:[-_.][A-Za-z]+)*[-_.]?)?([0-9]{1,18})")


def step_of(name: str) -> int | None:
    """Return the step in a checkpoint's name, zero-padded or not; None if it tells none."""
    found = _NUMBERED.fullmatch(name)
    return int(found[1]) if found is not None else None


def step_name(step: int) -> str:
    """Return the name under which a checkpoint manager saves a step."""
    return f"step-{step}"


class Dated(Protocol):
    """What has an age: a step, if its name tells one, and the time of its commit in seconds since 1970."""

    @property
    def step(self) -> int | None:
        """The step."""

    @property
    def committed_unix_s(self) -> float:
        """When it was committed."""


D = TypeVar("D", bound=Dated)


def newest_first(found: Iterable[D]) -> list[D]:
    """Return checkpoints in the order of their age, the newest first.

    The step decides; of those without one, and of equal ones, the time of the commit. Those with a step are before
    those without: they are what a training run resumes from.
    """
    return sorted(found, key=lambda one: (one.step is not None, one.step or 0, one.committed_unix_s), reverse=True)
