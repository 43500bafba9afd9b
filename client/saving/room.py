"""Room on the volume of a checkpoint, asked for before a save is staged; see :mod:`ckptd.checkpoint.space.room`.

Every rank asks for the images of all ranks: so all find alike, and the first refusal ends the save for all of them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from ckptd.checkpoint.space.room import Claim, check_room, find_room


@dataclass(frozen=True)
class VolumeClaim:
    """What a save under way wants, and of which volume."""

    claim: Claim
    device: int


def claim_room(checkpoint_id: str, marks: str, nbytes: int, others: Sequence[VolumeClaim]) -> VolumeClaim | None:
    """Return what a save takes of its volume, if that has so much; None where nobody can tell what it has.

    Args:
        checkpoint_id: Where the save shall be published.
        marks: What its hidden directory will have in its name.
        nbytes: Size of the images of all ranks.
        others: The job's saves that are under way.

    Raises:
        DiskFull: There is too little room.
    """
    room = find_room(checkpoint_id)
    if room is None:
        return None
    claim = Claim(checkpoint_id, marks, nbytes, time.time())
    check_room(claim, room, [other.claim for other in others if other.device == room.device])
    return VolumeClaim(claim, room.device)
