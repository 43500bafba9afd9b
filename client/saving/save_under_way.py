"""One save of this process, from its call to its end, and the seal that gives its image to the daemon."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass, field

from ckptd.client.saving.futures import SaveFuture
from ckptd.client.saving.layout import RankLayout
from ckptd.client.saving.room import VolumeClaim
from ckptd.client.saving.slots import Slot
from ckptd.client.saving.snapshot import Snapshot
from ckptd.client.session.options import SaveRequest
from ckptd.protocol.messages import Assigned, Committed, Sealed


@dataclass(eq=False)
class SaveUnderWay:
    """A save under way."""

    sequence: int
    request: SaveRequest
    begun_s: float
    future: SaveFuture
    snapshot: Snapshot | None = None
    committed: list[Committed] = field(default_factory=list)  # what the daemon told, once it is
    plan_s: float = 0.0
    claim: VolumeClaim | None = None  # the room that it takes on its volume
    assigned: Future[Assigned] = field(default_factory=Future)
    said: bytes = b""  # the last message about it, for the successor of a daemon that may not have got it


def seal_of(save: SaveUnderWay, slot: Slot, layout: RankLayout, object_bytes: bytes, stage_s: float) -> Sealed:
    """Return the seal of an image that lies in a slot, all of it.

    Args:
        save: Whose image it is.
        slot: Where it lies.
        layout: How.
        object_bytes: Column of the objects' lengths.
        stage_s: Seconds that staging took.
    """
    stall_s = save.future.stall_s if save.request.background else time.monotonic() - save.begun_s
    return Sealed(
        sequence=save.sequence,
        checkpoint_id=save.request.checkpoint_id,
        digest=layout.digest,
        arena=slot.arena.arena,
        slot=slot.number,
        control_bytes=layout.control_bytes,
        image_bytes=layout.image_bytes,
        object_bytes=object_bytes,
        plan_s=save.plan_s,
        stage_s=stage_s,
        stall_s=stall_s,
        overwrite=save.request.overwrite,
        code_bytes=layout.code_bytes(object_bytes),
        code_offset=layout.code_offset or 0,
        user=save.request.user,
        keep=save.request.keep,
    )
