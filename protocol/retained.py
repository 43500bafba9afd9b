"""The part of the attach conversation by which a load gets at a save that is still in memory. Needs no session.

OpenRetained -> RetainedOpened, with a descriptor for each image; when the load is over, RetainedClosed, unanswered.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec

from ckptd.protocol.wire import Message, Name, NBytes

# So many descriptors go with one frame, with some to spare. Source: include/net/scm.h, SCM_MAX_FD.
IMAGES_AT_MOST: Final = 250

Outcome = Literal["served", "overwritten", "damaged"]


class OpenRetained(Message, frozen=True, tag="open_retained"):
    """Client to daemon: open what is still in memory of a save."""

    protocol: int
    checkpoint_id: Name
    save_id: Name


class RetainedImage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One rank's image, which is a file of the checkpoint byte by byte, and where it lies in its arena.

    It is there for as long as the slot's state is RETAINED with this sequence: look again when all is read.
    """

    file: Name
    slot: Annotated[int, msgspec.Meta(ge=0, lt=2**20)]
    sequence: int
    offset: NBytes
    nbytes: NBytes


class RetainedOpened(Message, frozen=True, tag="retained_opened"):
    """Daemon to client: the images, in the order of their arenas' descriptors; none if they are not (all) there."""

    images: list[RetainedImage]


class RetainedClosed(Message, frozen=True, tag="retained_closed"):
    """Client to daemon: the load from memory is over. Unless it was ``served``, all was read again from the disk."""

    protocol: int
    outcome: Outcome
    read_bytes: NBytes
