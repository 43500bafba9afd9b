"""What every message is made of: the base class and the bounded types of fields."""

from __future__ import annotations

from typing import Annotated

import msgspec

NBytes = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
Count = Annotated[int, msgspec.Meta(ge=1, le=2**20)]
Rank = Annotated[int, msgspec.Meta(ge=0, lt=2**20)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    """Base of all messages: immutable, named on the wire, strict."""
