"""What a checkpoint manager is told, and what it tells of checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ckptd.checkpoint.folder.catalog import CatalogEntry
from ckptd.client.loading.report import LoadReport
from ckptd.protocol.errors import Unsupported
from ckptd.protocol.failing import OnFailure
from ckptd.protocol.retention_messages import Keep


@dataclass(frozen=True, kw_only=True)
class ManagerOptions:
    """How a :class:`~ckptd.client.manager.manager.CheckpointManager` saves, and what it keeps.

    Attributes:
        every_steps: A checkpoint is due at multiples of it.
        every_minutes: A checkpoint is due so long after the last one was begun. With neither, it is at every step.
        keep_last: So many of the newest are kept; None keeps all.
        keep_every_steps: Those whose step is a multiple of it are kept for ever; needs ``keep_last``.
        keep_best: So many with the best ``metric`` are kept; needs ``keep_last``.
        metric: Name of the metric by which checkpoints are compared.
        mode: Whether small or large values of it are good.
        on_failure: See :func:`ckptd.client.connect`; None: what `connect` was told.
        max_consecutive_failures: See there.
        pause_timeout_s: See there.
    """

    every_steps: int | None = None
    every_minutes: float | None = None
    keep_last: int | None = None
    keep_every_steps: int | None = None
    keep_best: int = 0
    metric: str | None = None
    mode: Literal["min", "max"] = "min"
    on_failure: OnFailure | None = None
    max_consecutive_failures: int | None = None
    pause_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        """Refuse what cannot be, before anything is saved."""
        for name in ("every_steps", "every_minutes", "keep_last", "keep_every_steps"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 2**20:
                raise Unsupported(f"{name}={value}", "give a number above 0 and at most 1048576, or leave it out")
        if not 0 <= self.keep_best <= 2**20:
            raise Unsupported(f"keep_best={self.keep_best}", "give 0 to 1048576")
        if self.keep_last is None and (self.keep_every_steps or self.keep_best):
            raise Unsupported("keep_every_steps or keep_best without keep_last", "give keep_last=1 or more")
        if self.keep_best and not self.metric:
            raise Unsupported("keep_best without metric", "give the name of the metric")
        if self.mode not in {"min", "max"}:
            raise Unsupported(f"mode={self.mode!r}", "give 'min' or 'max'")
        if self.on_failure is None and self.max_consecutive_failures is not None:
            raise Unsupported("max_consecutive_failures without on_failure", "give on_failure='continue' or another")

    @property
    def every_s(self) -> float | None:
        """The interval in seconds, if there is one."""
        return None if self.every_minutes is None else 60.0 * self.every_minutes

    def keep(self) -> Keep | None:
        """Return what the daemon keeps; None if that is everything."""
        if self.keep_last is None:
            return None
        return Keep(self.keep_last, self.keep_every_steps or 0, self.keep_best, self.metric or "", self.mode)


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """A committed checkpoint.

    Attributes:
        path: Its directory, which is its id.
        step: Of its training.
        committed_unix_s: When it was committed, in seconds since 1970.
        metrics: Numbers that were saved with it.
        metadata: What else was; None if nothing was.
        pinned: Whether retention leaves it alone.
    """

    path: str
    step: int
    committed_unix_s: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    metadata: Any = None
    pinned: bool = False


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What a restore has brought back.

    Attributes:
        step: The step to go on from.
        metrics: Numbers that were saved with the checkpoint.
        metadata: What else was.
        report: What was loaded, and which checkpoints were passed over.
    """

    step: int
    metrics: Mapping[str, float]
    metadata: Any
    report: LoadReport


def info_of(entry: CatalogEntry) -> CheckpointInfo:
    """Return what there is to tell of a checkpoint whose step is known."""
    assert entry.step is not None
    metrics = {} if entry.user is None else entry.user.metrics
    metadata = None if entry.user is None else entry.user.metadata
    return CheckpointInfo(
        path=entry.path,
        step=entry.step,
        committed_unix_s=entry.committed_unix_s,
        metrics=metrics,
        metadata=metadata,
        pinned=entry.pinned,
    )
