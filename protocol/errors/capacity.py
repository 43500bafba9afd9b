"""Memory, a slot or disk space is lacking."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ckptd.protocol.errors.base import CapacityError


@dataclass(eq=False)
class ShmTooSmall(CapacityError):
    """The staging arena does not fit into shared memory."""

    code: ClassVar[str] = "shm_too_small"
    path: str
    wanted_bytes: int
    free_bytes: int
    rule: str = ""  # which limit it was; "" is the room on the tmpfs at ``path``
    reserve_bytes: int = 0  # kept back from that limit, so not in ``free_bytes``
    making_bytes: int = 0  # promised to arenas that are being made, so not in ``free_bytes``
    figures: str = ""  # all limits

    def __str__(self) -> str:
        where = f"{self.rule} leaves" if self.rule else f"{self.path} has"
        text = (
            f"staging needs {self.wanted_bytes} bytes of shared memory, {where} {self.free_bytes} free; "
            "enlarge it, use fewer or smaller slots (connect(slots=..., slot_bytes=...)), "
            'or stage through a few small ones (connect(staging="waves"))'
        )
        if not self.figures:
            return text
        kept = f"{self.reserve_bytes} bytes kept in reserve, {self.making_bytes} for arenas being made"
        return f"{text} [{self.figures}; {kept}]"


@dataclass(eq=False)
class SlotTooSmall(CapacityError):
    """The state of this rank does not fit into a slot of the size that was asked for."""

    code: ClassVar[str] = "slot_too_small"
    wanted_bytes: int
    slot_bytes: int

    def __str__(self) -> str:
        sizes = f"this rank's part needs {self.wanted_bytes} bytes, a slot has {self.slot_bytes}"
        return f'{sizes}; raise connect(slot_bytes=...), leave it out, or connect(staging="waves")'


@dataclass(eq=False)
class SlotsBusy(CapacityError):
    """All slots still hold saves that are being made durable."""

    code: ClassVar[str] = "slots_busy"
    slots: int
    waited_s: float

    def __str__(self) -> str:
        waited = f"all {self.slots} slots are still being written after {self.waited_s:.1f} s"
        return f"{waited}; save less often, or connect(slots=...) with more"


@dataclass(eq=False)
class SaveSkipped(CapacityError):
    """The save was left out because all slots were busy and the policy is skip."""

    code: ClassVar[str] = "save_skipped"
    checkpoint_id: str
    rank: int

    def __str__(self) -> str:
        return f"save of {self.checkpoint_id} skipped: rank {self.rank} had no free slot and on_busy is 'skip'"


@dataclass(eq=False)
class DiskFull(CapacityError):
    """The volume of the checkpoint has too little room."""

    code: ClassVar[str] = "disk_full"
    path: str
    wanted_bytes: int
    free_bytes: int
    promised_bytes: int = 0  # to saves that are under way, so not in ``free_bytes``
    rule: str = ""  # whose quota it is; "" is the volume itself

    def __str__(self) -> str:
        where = f"{self.path} ({self.rule})" if self.rule else self.path
        others = f" beside {self.promised_bytes} for saves under way" if self.promised_bytes else ""
        return f"{where}: {self.wanted_bytes} bytes wanted, {self.free_bytes} free{others}; free space and save again"
