"""What all messages are made of."""

from __future__ import annotations

from typing import Annotated

import msgspec

NBytes = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
Hash = Annotated[int, msgspec.Meta(ge=0)]  # a hash: all 64 bits
Count = Annotated[int, msgspec.Meta(ge=1, le=2**20)]
Rank = Annotated[int, msgspec.Meta(ge=0, lt=2**20)]
Sequence = Annotated[int, msgspec.Meta(ge=0, le=2**62)]  # numbers the saves of a session
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    """Base of all messages: immutable, named on the wire, strict."""
