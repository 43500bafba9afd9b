"""``on_failure``: save calls that mind the saves before them; the rules are in :mod:`ckptd.protocol.failing`.

Ranks hear of a failure at different moments, so at each call they first agree on what they know, through the process
group's store; with ``"continue"`` and no limit there is nothing to agree on, and nothing is asked.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from ckptd.client.failures import USAGE, as_failure
from ckptd.client.saving.futures import SaveFuture, failed_save
from ckptd.client.session.exchange import Exchange, Place
from ckptd.protocol.errors import CkptdError, ErrorReport, LifecycleError, Unsupported, from_report
from ckptd.protocol.failing import ON_FAILURE, FailureRules, OnFailure, Pause, Raise
from ckptd.protocol.transient import Backoff

logger = logging.getLogger(__name__)

# Between two tries of a save that is waited for; the deadline ends them, not their number.
_PAUSES: Final = Backoff(attempts=1 << 62, first_s=1.0)


@dataclass(frozen=True, kw_only=True)
class FailureOptions:
    """What save calls do about saves that failed.

    Attributes:
        on_failure: ``"continue"``: log it; ``"raise"``: the next save call raises it; ``"pause"``: the next save call
            does not return before a save has worked, trying again with growing pauses.
        max_consecutive_failures: After so many in a row the next call raises in any case; None: never.
        pause_timeout_s: For how long ``"pause"`` tries before it raises, in seconds.
        catches: Whether a call that cannot reach the daemon counts as a failed save instead of raising, once a save
            has been begun; before that it is a mistake in the set-up.
        pauses: The waits in between.
    """

    on_failure: OnFailure = "continue"
    max_consecutive_failures: int | None = None
    pause_timeout_s: float = 600.0
    catches: bool = False
    pauses: Backoff = _PAUSES

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if self.on_failure not in ON_FAILURE:
            raise Unsupported(f"on_failure={self.on_failure!r}", "give 'continue', 'raise' or 'pause'")
        limit = self.max_consecutive_failures
        if limit is not None and limit < 1:
            raise Unsupported(f"max_consecutive_failures={limit}", "give 1 or more, or None for no limit")
        if not 0 < self.pause_timeout_s <= 7 * 86_400:
            raise Unsupported(f"pause_timeout_s={self.pause_timeout_s}", "give seconds, more than 0 and at most a week")

    @property
    def minds(self) -> bool:
        """Whether failures change anything."""
        return self.on_failure != "continue" or self.max_consecutive_failures is not None


@dataclass(frozen=True)
class FailureCount:
    """How saves have fared. ``last``: of those in a row, the newest."""

    in_all: int
    in_a_row: int
    last: CkptdError | None


class FailurePolicy:
    """The saves of one group of ranks.

    Args:
        options: What is done about failures.
        place: Returns this process's place among the ranks, for one exchange.
    """

    def __init__(self, options: FailureOptions, *, place: Callable[[], Place]) -> None:
        self.options = options
        self._place = place
        self._lock = threading.Lock()
        self._rules = FailureRules(options.on_failure, options.max_consecutive_failures)
        self._begun = 0
        self._worked = False  # whether a save has been begun, ever

    @property
    def count(self) -> FailureCount:
        """How saves have fared so far."""
        with self._lock:
            failures = self._rules.in_a_row()
            return FailureCount(self._rules.failed_in_all, len(failures), failures[0] if failures else None)

    def save(
        self, begin: Callable[[], SaveFuture], *, told: bool = False, checkpoint_id: str | None = None
    ) -> SaveFuture:
        """Begin a save, unless failures before it say otherwise. All ranks must call it alike.

        Args:
            begin: Begins it.
            told: The caller waits for the outcome by itself, so that a failure need not be raised once more.
            checkpoint_id: Of the save, as its future tells it if it cannot be begun; None: then it is raised.

        Raises:
            SavesFailing: Too many failed in a row.
            CkptdError: An earlier save's failure; or, of ``"pause"``, the last one before the deadline.
        """
        if self.options.minds:
            match self._rules_say():
                case Raise(error):
                    raise as_failure(error)
                case Pause(error):
                    return self._insist(begin, error)
        return self._begin(begin, told=told, checkpoint_id=checkpoint_id)

    def _begin(self, begin: Callable[[], SaveFuture], *, told: bool, checkpoint_id: str | None = None) -> SaveFuture:
        self._begun += 1
        number = self._begun
        if told:
            self._rules.note_raised(number)
        try:
            future = begin()
        except LifecycleError as error:  # no daemon, say: there may be one again
            if checkpoint_id is None or not (self._worked and self.options.catches):
                raise
            future = failed_save(checkpoint_id, error)
        self._worked = True
        future.add_done_callback(lambda done: self._note(number, done))
        return future

    def _note(self, number: int, future: Any) -> None:
        error = future.exception()
        ours = error if isinstance(error, CkptdError) else None
        with self._lock:
            self._rules.note(number, ours)
            failures = len(self._rules.in_a_row())
        if ours is not None:
            logger.warning("save of %s failed, %d in a row: %s", future.checkpoint_id, failures, ours)

    # --- agreeing ------------------------------------------------------------------------------------------------

    def _rules_say(self) -> Any:
        with self._lock:
            mine = self._rules.outcomes
        with Exchange(self._place()) as exchange:
            agreed = _decoded(exchange.together("outcomes", lambda: _encoded(mine), _united))
        with self._lock:
            for number, error in agreed.items():
                self._rules.note(number, error)
            return self._rules.verdict(agreed)

    # --- pausing -------------------------------------------------------------------------------------------------

    def _insist(self, begin: Callable[[], SaveFuture], error: CkptdError) -> SaveFuture:
        """Save until it works. The tensors cannot change meanwhile: the trainer waits here."""
        logger.warning("training pauses until a save works again: %s", error)
        until_s = time.monotonic() + self.options.pause_timeout_s
        attempt = 1
        while True:
            future: SaveFuture | None = None
            try:
                future = self._begin(begin, told=True)
                failed = future.exception()  # the daemon's deadlines bound this wait
            except CkptdError as refused:
                if isinstance(refused, USAGE):
                    raise
                failed = refused  # no daemon, say: there may be one again
            if failed is not None and not isinstance(failed, CkptdError):
                raise failed
            if isinstance(failed, CkptdError):
                error = failed
            wait_s = self.options.pauses.wait_s(attempt) or self.options.pauses.most_s
            answer = self._agreed(good=failed is None, late=time.monotonic() + wait_s > until_s)
            if answer == b"done" and future is not None:
                return future
            if answer == b"late":
                raise as_failure(error)
            time.sleep(wait_s)
            attempt += 1

    def _agreed(self, *, good: bool, late: bool) -> bytes:
        """Return what all ranks do next: are "done", give up because it is "late", or try "again"."""

        def answer(parts: list[bytes]) -> list[bytes]:
            told = b"done" if all(part == b"good" for part in parts) else b"late" if late else b"again"
            return [told] * len(parts)

        with Exchange(self._place()) as exchange:
            return exchange.together("pause", lambda: b"good" if good else b"bad", answer)


def _encoded(outcomes: Mapping[int, CkptdError | None]) -> bytes:
    return msgspec.json.encode([(number, error and error.report()) for number, error in outcomes.items()])


def _decoded(data: bytes) -> dict[int, CkptdError | None]:
    told = msgspec.json.decode(data, type=list[tuple[int, ErrorReport | None]])
    return {number: None if report is None else from_report(report) for number, report in told}


def _united(parts: list[bytes]) -> list[bytes]:
    """Return what any rank knows; a save that failed for one has failed."""
    known: dict[int, CkptdError | None] = {}
    for part in parts:
        for number, error in _decoded(part).items():
            known[number] = known.get(number) or error
    return [_encoded(known)] * len(parts)
