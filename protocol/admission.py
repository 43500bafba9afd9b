"""Whether a new arena may be made: the rule, without I/O. Who measures is :mod:`ckptd.staging.memory`.

Invariant: what is admitted fits every limit at once, beside all that was admitted before and is still being made, and
leaves the reserve to whoever else runs on the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ckptd.protocol.errors import ShmTooSmall


@dataclass(frozen=True)
class Limit:
    """One thing that bounds memory.

    Attributes:
        rule: What it is, for people; "" is the room of the tmpfs itself.
        free_bytes: What is left of it now.
        total_bytes: How large it is; a reserve given as a fraction is a fraction of this.
        shared: Whether others live from it, too, so that the reserve is kept; a tmpfs holds nothing else.
    """

    rule: str
    free_bytes: int
    total_bytes: int
    shared: bool = True


@dataclass(frozen=True)
class Reserve:
    """What is never given to arenas: of each limit the larger of a number of bytes and a fraction of it."""

    nbytes: int
    fraction: float

    def of(self, limit: Limit) -> int:
        """Return how many bytes of a limit are kept back."""
        return max(self.nbytes, int(limit.total_bytes * self.fraction)) if limit.shared else 0


def admit(wanted_bytes: int, limits: Sequence[Limit], reserve: Reserve, *, making_bytes: int, path: str) -> None:
    """Return if an arena may be made.

    Args:
        wanted_bytes: Its size.
        limits: All limits, as just measured; at least one.
        reserve: What stays free.
        making_bytes: Admitted before and not yet taken from the limits: arenas whose pages are still being reserved.
        path: Directory on tmpfs, for the error.

    Raises:
        ShmTooSmall: The tightest limit has too little left; all figures are told.
    """
    left = {limit.rule: limit.free_bytes - reserve.of(limit) - making_bytes for limit in limits}
    tightest = min(limits, key=lambda limit: left[limit.rule])
    free_bytes = max(0, left[tightest.rule])
    if wanted_bytes <= free_bytes:
        return
    figures = ", ".join(f"{limit.rule or path}: {limit.free_bytes} of {limit.total_bytes} free" for limit in limits)
    kept_bytes = reserve.of(tightest)
    raise ShmTooSmall(path, wanted_bytes, free_bytes, tightest.rule, kept_bytes, making_bytes, figures)
