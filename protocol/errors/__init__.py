"""The one tree of errors, and how they cross processes.

The class is the kind, the fields are the facts, ``__str__`` is one line (what, where, what to do), ``code`` is the
name on the wire. Errors travel as :class:`ErrorReport`, never as pickles. A module for each branch.
"""

from __future__ import annotations

import contextlib
from dataclasses import fields
from typing import Any, Final

from ckptd.protocol.errors.base import (
    CapacityError,
    CkptdError,
    ErrorReport,
    Fact,
    LifecycleError,
    PlanError,
    RequestError,
    StorageError,
    UnexpectedError,
)
from ckptd.protocol.errors.capacity import DiskFull, SaveSkipped, ShmTooSmall, SlotsBusy, SlotTooSmall
from ckptd.protocol.errors.lifecycle import (
    BadPlan,
    DaemonLost,
    DaemonUnavailable,
    DeadlineExceeded,
    RankLost,
    SessionClosed,
    SessionUnknown,
    ShuttingDown,
    WorkerDied,
)
from ckptd.protocol.errors.request import (
    BadConfig,
    BadMessage,
    CheckpointExists,
    Forbidden,
    Mismatch,
    MissingKeys,
    MultiNode,
    OutputExists,
    ProtocolMismatch,
    RankMismatch,
    RankTaken,
    UnknownCheckpoint,
    UnknownExtension,
    Unsupported,
    UserCodeFailed,
    WrongToken,
)
from ckptd.protocol.errors.storage import (
    BadFile,
    BadIndex,
    ItemNotReported,
    MissingFile,
    NoGoodCheckpoint,
    ObjectStoreFailed,
    RankFailed,
    SaveAborted,
    SavesFailing,
    SeveralFailed,
    SystemCallFailed,
    TruncatedFile,
    WriteIncomplete,
    WrongBits,
    WrongUpload,
)

__all__ = [
    "BY_CODE",
    "BadConfig",
    "BadFile",
    "BadIndex",
    "BadMessage",
    "BadPlan",
    "CapacityError",
    "CheckpointExists",
    "CkptdError",
    "DaemonLost",
    "DaemonUnavailable",
    "DeadlineExceeded",
    "DiskFull",
    "ErrorReport",
    "Fact",
    "Forbidden",
    "ItemNotReported",
    "LifecycleError",
    "Mismatch",
    "MissingFile",
    "MissingKeys",
    "MultiNode",
    "NoGoodCheckpoint",
    "ObjectStoreFailed",
    "OutputExists",
    "PlanError",
    "ProtocolMismatch",
    "RankFailed",
    "RankLost",
    "RankMismatch",
    "RankTaken",
    "RequestError",
    "SaveAborted",
    "SaveSkipped",
    "SavesFailing",
    "SessionClosed",
    "SessionUnknown",
    "SeveralFailed",
    "ShmTooSmall",
    "ShuttingDown",
    "SlotTooSmall",
    "SlotsBusy",
    "StorageError",
    "SystemCallFailed",
    "TruncatedFile",
    "UnexpectedError",
    "UnknownCheckpoint",
    "UnknownExtension",
    "Unsupported",
    "UserCodeFailed",
    "WorkerDied",
    "WriteIncomplete",
    "WrongBits",
    "WrongToken",
    "WrongUpload",
    "for_rank",
    "from_report",
]


def _leaves(kind: type[CkptdError]) -> dict[str, type[CkptdError]]:
    found = {kind.code: kind} if "code" in vars(kind) else {}
    for sub in kind.__subclasses__():
        found |= _leaves(sub)
    return found


BY_CODE: Final[dict[str, type[CkptdError]]] = _leaves(CkptdError)


def from_report(report: ErrorReport) -> CkptdError:
    """Return the error that a report describes; one that is unknown or does not fit becomes UnexpectedError."""
    kind = BY_CODE.get(report.code)
    facts: dict[str, Any] = dict(report.facts)
    if kind is not None and kind is not CkptdError and {f.name for f in fields(kind)} == set(facts):  # type: ignore[arg-type]
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            error = kind(**facts)
            str(error)  # facts of a wrong type show when they are told
            return error
    return UnexpectedError(f"{report.code}: " + ", ".join(f"{k}={v}" for k, v in facts.items()))


def for_rank(rank: int, error: CkptdError) -> CkptdError:
    """Return ``error`` as the failure of ``rank``, unless it already names a rank."""
    return error if hasattr(error, "rank") else RankFailed(rank, error.code, str(error))
