"""What of the last saves is still in memory, for loads: which images, where they lie, and read-only descriptors.

Invariant: a peer gets descriptors of its own user's memory only, and of no image that somebody may be staging over.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from ckptd.checkpoint.names import image_name
from ckptd.daemon.job.generation import Generation
from ckptd.daemon.job.jobs import Job
from ckptd.daemon.session.sessions import Peer
from ckptd.protocol.retained import IMAGES_AT_MOST, OpenRetained, RetainedImage, RetainedOpened
from ckptd.staging.arena import SlotState, read_slot, slot_offset


def open_images(jobs: Iterable[Job], peer: Peer, request: OpenRetained) -> tuple[RetainedOpened, list[int]]:
    """Find the save that a peer asks for.

    Whether another user's job holds it is not told: the answer is the same as if nobody did.

    Returns:
        Its images, and as many descriptors, which are the caller's to close; nothing if they are not all there.
    """
    for job in jobs:
        generation = job.saves.outcomes.retained
        if job.owner.uid == peer.uid and generation is not None and generation.save_id == request.save_id:
            return _opened(generation)
    return RetainedOpened([]), []


def _opened(generation: Generation) -> tuple[RetainedOpened, list[int]]:
    images: list[RetainedImage] = []
    descriptors: list[int] = []
    if len(generation.seals) > IMAGES_AT_MOST or not is_intact(generation):
        return RetainedOpened([]), []
    try:
        for rank, seal in sorted(generation.seals.items()):
            slot, arena = seal.message.slot, seal.arena
            # By descriptor: whoever has cleaned tmpfs has removed the name, not the memory.
            descriptors.append(os.open(f"/proc/self/fd/{arena.descriptor}", os.O_RDONLY | os.O_CLOEXEC))
            offset = slot_offset(slot, arena.slot_bytes) + seal.message.control_bytes
            image_bytes = seal.message.image_bytes
            images.append(RetainedImage(image_name(rank), slot, generation.sequence, offset, image_bytes))
    except OSError:  # out of descriptors: the disk has it all, too
        for descriptor in descriptors:
            os.close(descriptor)
        return RetainedOpened([]), []
    return RetainedOpened(images), descriptors


def is_intact(generation: Generation) -> bool:
    """Return whether all slots of a committed generation still hold its images."""
    return all(
        read_slot(seal.arena.descriptor, seal.message.slot)[::2] == (SlotState.RETAINED, generation.sequence)
        for seal in generation.seals.values()
    )
