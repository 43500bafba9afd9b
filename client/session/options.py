"""What is asked of a session, and of one save: arguments that are understood and checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ckptd.client.saving.handover import HandOver
from ckptd.client.saving.slots import OnBusy
from ckptd.client.saving.waves import WAVE_SLOT_BYTES
from ckptd.protocol.errors import Unsupported
from ckptd.protocol.messages import Committed
from ckptd.protocol.retention_messages import Keep
from ckptd.staging.arena import ALIGNMENT_BYTES, MAX_SLOTS

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata


@dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """How a session behaves; see :func:`ckptd.client.connect`."""

    on_busy: OnBusy = "wait"
    staging: Literal["blocking", "background", "waves"] = "blocking"
    slots: int = 2
    slot_bytes: int | None = None
    connect_timeout_s: float = 60.0
    busy_timeout_s: float = 600.0
    progress_timeout_s: float = 300.0
    reconnect_timeout_s: float = 60.0
    touch_threads: int = 2

    def __post_init__(self) -> None:
        """Refuse what cannot be, before anything is opened."""
        if self.on_busy not in {"wait", "skip", "fail"}:
            raise Unsupported(f"on_busy={self.on_busy!r}", "give 'wait', 'skip' or 'fail'")
        if self.staging not in {"blocking", "background", "waves"}:
            raise Unsupported(f"staging={self.staging!r}", "give 'blocking', 'background' or 'waves'")
        if self.staging == "waves" and self.slot_bytes is None:
            object.__setattr__(self, "slot_bytes", WAVE_SLOT_BYTES)
        if not 1 <= self.slots <= MAX_SLOTS:
            raise Unsupported(f"slots={self.slots}", f"give 1 to {MAX_SLOTS}; 2 let a save overlap the next")
        if self.slot_bytes is not None and self.slot_bytes < ALIGNMENT_BYTES:
            raise Unsupported(f"slot_bytes={self.slot_bytes}", f"give at least {ALIGNMENT_BYTES}")
        for name in ("connect_timeout_s", "busy_timeout_s", "progress_timeout_s", "reconnect_timeout_s"):
            if not 0 < getattr(self, name) <= 86_400:
                raise Unsupported(f"{name}={getattr(self, name)}", "give seconds, more than 0 and at most a day")


@dataclass(frozen=True)
class SaveRequest:
    """One call of `save` or `async_save`, with its arguments understood; all but the state dict, which nobody keeps."""

    checkpoint_id: str
    settings: str  # planner settings that change the plan
    flat: bool
    overwrite: bool
    read_metadata: Callable[[str, Committed], Metadata]  # checkpoint id and what the daemon told of it -> Metadata
    background: bool
    user: str = ""  # what is stored with the checkpoint; see ckptd.checkpoint.folder.user_data
    keep: Keep | None = None  # what of its folder is kept after the commit
    hand_over: HandOver | None = None  # planner and writer that shall do the save in a worker; None: ckptd's own way
