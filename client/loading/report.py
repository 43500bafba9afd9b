"""What a load did: the answer of `load`, for people and for programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

# A line of text names so many keys of each kind; the report itself holds all.
_NAMES_TOLD: Final = 3


@dataclass(frozen=True, slots=True)
class Difference:
    """A key that the state dict wants otherwise than the checkpoint holds it.

    Attributes:
        name: The key.
        wanted: Shape, dtype or kind in the state dict.
        stored: The same in the checkpoint.
    """

    name: str
    wanted: str
    stored: str

    def __str__(self) -> str:
        return f"{self.name} (wanted {self.wanted}, stored {self.stored})"


@dataclass(frozen=True, slots=True)
class PassedOver:
    """A damaged checkpoint that a load with ``fallback=True`` did not take.

    Attributes:
        path: Its directory.
        reason: What is wrong with it.
    """

    path: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What was loaded, and what was not. All but bytes, source and time is known before a byte is read.

    Attributes:
        path: The checkpoint.
        loaded: Number of keys that were loaded.
        missing: Keys that the checkpoint lacks and ``strict`` let pass; left as they were.
        unexpected: Keys of the checkpoint that the state dict did not ask for.
        mismatched: Keys of another shape, kind or (with ``convert_dtype=False``) dtype that ``strict`` let pass; left.
        converted: Keys that were loaded and converted to the state dict's dtype.
        absent_optimizer_state: Entries of parameters for which the checkpoint holds no optimizer state at all, as
            those have that were frozen or never stepped; left as they were.
        source: ``"disk"``, ``"memory"`` or ``"node cache"``; of the last, too, ``read_bytes`` are from disk.
        needed_bytes: What had to come from the checkpoint.
        read_bytes: What was brought for that, gaps between ranges and rounding to blocks included; the index not.
        seconds: From the call to its end.
        passed_over: Newer checkpoints that were damaged, with ``fallback=True``; ``path`` is the one that was loaded.
    """

    path: str
    loaded: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[Difference, ...] = ()
    converted: tuple[Difference, ...] = ()
    absent_optimizer_state: tuple[str, ...] = ()
    source: str = "disk"
    needed_bytes: int = 0
    read_bytes: int = 0
    seconds: float = 0.0
    passed_over: tuple[PassedOver, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every key of the state dict was loaded, optimizer state that never existed aside."""
        return not (self.missing or self.mismatched)

    def __str__(self) -> str:
        speed = f"{self.read_bytes / 1e6:.1f} MB from {self.source} in {self.seconds:.3f} s"
        parts = [f"loaded {self.loaded} keys from {self.path}: {speed}"]
        parts += [
            f"{len(keys)} {what}: {', '.join(map(str, keys[:_NAMES_TOLD]))}{', ...' * (len(keys) > _NAMES_TOLD)}"
            for what, keys in (
                ("missing", self.missing),
                ("unexpected", self.unexpected),
                ("mismatched", self.mismatched),
                ("converted", self.converted),
                ("without optimizer state", self.absent_optimizer_state),
            )
            if keys
        ]
        return "; ".join(parts)
