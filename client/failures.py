"""`CheckpointException`, and every failure of a save or load as one.

Users who come from torch catch `CheckpointException`; others catch the class of the cause. A failure that leaves this
library is both: for each class of the error tree there is one that also derives from :class:`CheckpointException`, with
the same facts, text and code. Wrong usage (`Unsupported`, a bad configuration) stays what it is.
"""

from __future__ import annotations

import contextlib
import copy
import traceback
from types import TracebackType
from typing import Any, Final

import torch.distributed as dist
from torch.distributed.checkpoint.api import WRAPPED_EXCEPTION
from torch.distributed.checkpoint.api import CheckpointException as TorchCheckpointException

from ckptd.protocol.errors import BadConfig, CkptdError, Unsupported

# What the caller did wrong, before anything was saved or loaded; torch raises ValueError or AssertionError then.
USAGE: Final = (Unsupported, BadConfig)

_CLASSES: Final[dict[type[CkptdError], type[CkptdError]]] = {}


class CheckpointException(TorchCheckpointException, RuntimeError):
    """A save or a load failed. Caught by `except Exception`, which torch's own class, a BaseException, is not.

    Args:
        msg: Which step failed.
        failures: By rank, the error and where it was raised.
    """

    @property
    def failures(self) -> dict[int, WRAPPED_EXCEPTION]:
        """The ranks that failed, each with its error and where it was raised."""
        return self._failures


def as_failure(error: CkptdError, *, rank: int | None = None) -> CkptdError:
    """Return an error as a failure: of its own class, and a CheckpointException.

    Where it was raised is kept as text in ``failures``, with a copy of the error that refers to no frame.

    Args:
        error: What went wrong; one that is a failure already is returned as it is.
        rank: Whose failure it is, if the error does not say; the default is this process's rank.
    """
    if isinstance(error, CheckpointException):
        return error
    named = getattr(error, "rank", None)
    whose = named if isinstance(named, int) else rank if rank is not None else own_rank()
    failure = _restore(type(error), error.args, vars(error), {whose: (copy.copy(error), _origin(error))})
    failure.__cause__ = error.__cause__  # which also keeps Python from telling the same error twice, as a context
    return failure.with_traceback(error.__traceback__)


class as_checkpoint_failure(contextlib.ContextDecorator):  # noqa: N801  # used as a function
    """Let failures leave as CheckpointException; as ``with`` or, called, as a decorator. Wrong usage stays as it is."""

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None
    ) -> None:
        if isinstance(error, CkptdError) and not isinstance(error, USAGE):
            raise as_failure(error)


def failure_class(kind: type[CkptdError]) -> type[CkptdError]:
    """Return the class that is both a kind of error and a CheckpointException; the same one at every call."""
    made = _CLASSES.get(kind)
    if made is None:
        made = _CLASSES.setdefault(kind, _make_class(kind))
    return made


def _make_class(kind: type[CkptdError]) -> type[CkptdError]:
    members = {
        "__module__": __name__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__str__": kind.__str__,  # one line; torch's has tracebacks in it
        "__reduce__": _reduce,
        "_kind": kind,
    }
    return type(kind.__name__, (CheckpointException, kind), members)


def _reduce(failure: Any) -> tuple[Any, ...]:
    facts = {name: value for name, value in vars(failure).items() if name != "_failures"}
    return _restore, (failure._kind, failure.args, facts, failure.failures)


def _restore(
    kind: type[CkptdError], args: tuple[Any, ...], facts: dict[str, Any], failures: dict[int, WRAPPED_EXCEPTION]
) -> CkptdError:
    made = failure_class(kind)
    failure = made.__new__(made, *args)
    vars(failure).update(facts, _failures=failures)
    return failure


def _origin(error: BaseException) -> traceback.StackSummary:
    """Return where an error was raised, as plain text: frames hold local variables, and from 3.13 on code objects."""
    frames = traceback.extract_tb(error.__traceback__)
    return traceback.StackSummary.from_list([(f.filename, f.lineno or 0, f.name, f.line) for f in frames])


def own_rank() -> int:
    """Return this process's rank in the default group; 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
