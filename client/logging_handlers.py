"""Events of saves and loads, phase by phase, for whoever attaches a handler; and the names of the loggers.

Every module logs under its own name, ``ckptd.client.session.session`` and so on, so that ``logging.getLogger("ckptd")``
governs all text. Events go to one logger of their own, :data:`EVENT_LOGGER_NAME`, which nobody hears by default: a
record's ``event`` attribute is an :class:`Event`, its message one line of text. The root logger is never touched.

    add_handler("mine", MyHandler())  # any logging.Handler; one of the same name is replaced

Phases of a save, in order: plan, stage, seal, then commit or fail. Of a load: plan, read, then finish or fail;
before these, with ``fallback=True``, a fallback for each damaged checkpoint that is passed over. ``seal``
and what comes before are told by the rank's own process; ``commit`` and ``fail`` in the thread that hears the daemon.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Literal, Self

from ckptd.client.failures import own_rank

EVENT_LOGGER_NAME: Final = "ckptd.events"

Operation = Literal["save", "load"]
Phase = Literal["plan", "stage", "seal", "commit", "read", "finish", "fail", "fallback"]


@dataclass(frozen=True, slots=True)
class Event:
    """One phase of one save or load has ended.

    Attributes:
        operation: Whose phase it is.
        phase: Which one.
        checkpoint_id: Of the save or load.
        rank: Who says so.
        seconds: How long the phase took; of commit, finish and fail, the whole operation.
        bytes: Staged or read by this rank, or committed by all of them; 0 where it says nothing.
        error: What went wrong; only of a fail or a fallback.
        time: When the phase ended, in seconds since 1970.
    """

    operation: Operation
    phase: Phase
    checkpoint_id: str
    rank: int
    seconds: float
    bytes: int
    error: BaseException | None
    time: float

    def __str__(self) -> str:
        text = f"{self.operation} {self.phase}: {self.checkpoint_id} rank {self.rank} {self.seconds:.3f} s"
        return f"{text}: {self.error}" if self.error is not None else f"{text} {self.bytes} bytes"


_LEVELS: Final[dict[Phase, int]] = {
    "commit": logging.INFO,
    "finish": logging.INFO,
    "fallback": logging.WARNING,
    "fail": logging.ERROR,
}
_logger: Final = logging.getLogger(EVENT_LOGGER_NAME)
# Events go to this logger's own handlers and no further: an application's others asked for text, not for events.
_logger.setLevel(logging.DEBUG)
_named: Final[dict[str, logging.Handler]] = {}


def add_handler(name: str, handler: logging.Handler) -> None:
    """Have a handler told of every event.

    Args:
        name: What :func:`remove_handler` calls it; a handler that was added under this name is replaced.
        handler: Its level counts: phases are DEBUG, ends are INFO, fallbacks WARNING, failures
            ERROR. What it raises is printed as
            `logging` does and harms nothing. It runs in the thread of the save or load, so let it be quick.
    """
    remove_handler(name)
    _named[name] = handler
    _logger.addHandler(handler)


def remove_handler(name: str) -> None:
    """Take a handler out again; one that is not there is no error."""
    handler = _named.pop(name, None)
    if handler is not None:
        _logger.removeHandler(handler)


def note(
    operation: Operation,
    phase: Phase,
    checkpoint_id: str,
    rank: int | None,
    seconds: float,
    *,
    nbytes: int = 0,
    error: BaseException | None = None,
) -> None:
    """Tell of an event; costs a function call if nobody listens, and never raises.

    Args:
        operation: See :class:`Event`, and so are the others.
        phase: See there.
        checkpoint_id: See there.
        rank: See there; None is the rank in the default group.
        seconds: See there.
        nbytes: See there.
        error: See there.
    """
    if not _logger.handlers:
        return
    level = _LEVELS.get(phase, logging.DEBUG)
    if not _logger.isEnabledFor(level):
        return
    whose = own_rank() if rank is None else rank
    event = Event(operation, phase, checkpoint_id, whose, seconds, nbytes, error, time.time())
    record = logging.LogRecord(EVENT_LOGGER_NAME, level, __file__, 0, str(event), None, None, "note")
    record.event = event
    for handler in tuple(_logger.handlers):
        if level >= handler.level:
            _hand_over(handler, record)


class Phases:
    """The phases of one load: each lasts from the end of the one before it.

    As a context it tells of the failure, if there is one.
    """

    def __init__(self, operation: Operation, checkpoint_id: str) -> None:
        self._operation: Operation = operation
        self._checkpoint_id = checkpoint_id
        self._begun_s = self._last_s = time.monotonic()

    def end(self, phase: Phase, *, nbytes: int = 0) -> None:
        """Tell that a phase has ended; of a finish, how long it all took."""
        now = time.monotonic()
        since = self._begun_s if phase == "finish" else self._last_s
        note(self._operation, phase, self._checkpoint_id, None, now - since, nbytes=nbytes)
        self._last_s = now

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None
    ) -> None:
        if error is not None:
            seconds = time.monotonic() - self._begun_s
            note(self._operation, "fail", self._checkpoint_id, None, seconds, error=error)


def _hand_over(handler: logging.Handler, record: logging.LogRecord) -> None:
    try:
        handler.handle(record)
    except Exception:  # noqa: BLE001  # a user's handler: its bug must not cost a checkpoint
        handler.handleError(record)
