"""The closed label sets of the metrics, and the kind that an error counts as.

Invariant: a label never holds what a user named: no path, no job, no step.
"""

from __future__ import annotations

from typing import Final, Literal

from ckptd.protocol.errors import (
    BY_CODE,
    CapacityError,
    CkptdError,
    LifecycleError,
    PlanError,
    RankFailed,
    RequestError,
    StorageError,
)

Phase = Literal["plan", "stage", "queue", "write", "fsync", "commit"]
Outcome = Literal["committed", "failed", "skipped"]
Kind = Literal["request", "capacity", "storage", "plan", "lifecycle", "internal"]
Reason = Literal["garbage", "token", "protocol", "uid", "stale"]
Refusal = Literal["host", "token", "malformed", "streams", "crowd", "slow"]
SlotState = Literal["free", "staging", "sealed", "persisting"]
Memory = Literal["absent", "served", "overwritten", "damaged"]  # what a load found of a save in memory
Role = Literal["daemon", "worker"]
Volume = Literal["shm", "checkpoints"]

_KINDS: Final[tuple[tuple[type[CkptdError], Kind], ...]] = (
    (RequestError, "request"),
    (CapacityError, "capacity"),
    (StorageError, "storage"),
    (PlanError, "plan"),
    (LifecycleError, "lifecycle"),
)


def failure_kind(error: CkptdError) -> Kind:
    """Return the class of an error as a label; a rank's failure counts as what caused it."""
    kind: type[CkptdError] = type(error)
    if isinstance(error, RankFailed):
        kind = BY_CODE.get(error.cause_code, CkptdError)
    return next((label for base, label in _KINDS if issubclass(kind, base)), "internal")
