"""Messages about what is kept of a folder; part of :mod:`ckptd.protocol.messages`, with its rule of change."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from ckptd.protocol.wire import Count, Message, Name, NBytes

UserText = Annotated[str, msgspec.Meta(max_length=1 << 16)]


class Keep(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which checkpoints of a folder are kept: the union of what each rule keeps; see checkpoint/folder/retention.py."""

    last: Count | None = None  # the newest ones; None keeps all
    every_steps: NBytes = 0  # those whose step is a multiple; 0: no such rule
    best: NBytes = 0  # so many with the best metric
    metric: str = ""
    mode: Literal["min", "max"] = "min"


class Retain(Message, frozen=True, tag="retain"):
    """Remove from a folder what is not to be kept, now; the daemon does so after a commit without being asked."""

    root: Name
    keep: Keep


class RetainTask(Message, frozen=True, tag="retain_task"):
    """Remove from ``root`` what is not to be kept. ``busy``: names of checkpoints that are being saved."""

    root: Name
    keep: Keep
    busy: list[str]


class RetainDone(Message, frozen=True, tag="retain_done"):
    """Names that were removed, names that could not be had (read by somebody, or changed), and what went wrong."""

    removed: list[str]
    held: list[str]
    errors: list[str]
