"""What a save call does about saves before it that failed: the rules, without I/O.

Saves are numbered by their calls, so that all ranks speak of the same ones; given the same outcomes, they come to the
same verdict. Invariant: ``raise`` raises a failure at most once; the limit counts it until a save commits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from ckptd.protocol.errors import CkptdError, RankFailed, SavesFailing, SaveSkipped

OnFailure = Literal["continue", "raise", "pause"]
ON_FAILURE: Final = ("continue", "raise", "pause")

# Outcomes of so many saves are remembered; no job has more in flight, or puts up with more failures.
REMEMBERED: Final = 1024

Outcomes = Mapping[int, CkptdError | None]


@dataclass(frozen=True)
class Go:
    """Save."""


@dataclass(frozen=True)
class Raise:
    """Do not save; raise this."""

    error: CkptdError


@dataclass(frozen=True)
class Pause:
    """Save, and do not return before a save has worked. ``error``: why."""

    error: CkptdError


Verdict = Go | Raise | Pause


def counts(error: CkptdError | None) -> bool:
    """Return whether an outcome says something of the storage: one that was skipped by policy does not."""
    skipped = isinstance(error, RankFailed) and error.cause_code == SaveSkipped.code
    return not (skipped or isinstance(error, SaveSkipped))


class FailureRules:
    """The outcomes of a job's saves, and what follows.

    Args:
        on_failure: ``"continue"``: nothing; ``"raise"``: the next call raises; ``"pause"``: it insists on success.
        limit: After so many failures in a row the next call raises in any case; None: no limit.
    """

    def __init__(self, on_failure: OnFailure, limit: int | None) -> None:
        self._on_failure, self._limit = on_failure, limit
        self._outcomes: dict[int, CkptdError | None] = {}
        self._raised = 0  # failures up to this number have been raised
        self._counted = 0  # and up to this one, have been counted into a limit that was reached
        self.failed_in_all = 0

    @property
    def outcomes(self) -> dict[int, CkptdError | None]:
        """What is known, by the number of the save; None is a commit."""
        return dict(self._outcomes)

    def note(self, number: int, error: CkptdError | None) -> None:
        """A save has ended; to hear so again changes nothing."""
        if number in self._outcomes or not counts(error):
            return
        self._outcomes[number] = error
        self.failed_in_all += error is not None
        while len(self._outcomes) > REMEMBERED:
            del self._outcomes[min(self._outcomes)]

    def note_raised(self, number: int) -> None:
        """The caller has heard of a failure already."""
        self._raised = max(self._raised, number)

    def in_a_row(self, outcomes: Outcomes | None = None) -> list[CkptdError]:
        """Return the failures since the last save that worked, the newest first."""
        known = self._outcomes if outcomes is None else outcomes
        found: list[CkptdError] = []
        for number in sorted(known, reverse=True):
            error = known[number]
            if error is None or number <= self._counted:
                break
            found.append(error)
        return found

    def verdict(self, outcomes: Outcomes | None = None) -> Verdict:
        """Return what the next save call does.

        Args:
            outcomes: What the ranks have agreed to know; None is what this one knows.
        """
        known = self._outcomes if outcomes is None else outcomes
        newest = max(known, default=0)
        failures = self.in_a_row(known)
        if self._limit is not None and len(failures) >= self._limit:
            self._counted = self._raised = newest  # who goes on all the same gets as many tries again
            return Raise(SavesFailing(len(failures), str(failures[0])))
        untold = [known[number] for number in sorted(known) if number > self._raised and known[number] is not None]
        if self._on_failure == "raise" and untold and untold[-1] is not None:
            self._raised = newest
            return Raise(untold[-1])
        if self._on_failure == "pause" and failures:
            return Pause(failures[0])
        return Go()
