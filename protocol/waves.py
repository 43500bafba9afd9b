"""The rules of an image that is staged in waves, without I/O: events in, actions out.

A rank whose image is larger than its arena stages one range after the other, each in a slot of its own, and a slot is
free again once its wave is written. Invariants: the waves tile the image, none is written twice, a slot is freed only
after its wave was reported written, and :class:`AllWritten` comes only after every byte was.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ckptd.protocol.errors import BadMessage
from ckptd.protocol.messages import Sealed
from ckptd.protocol.wave_messages import WaveSealed


@dataclass(frozen=True)
class Wave:
    """A range ``[begin, begin + nbytes)`` of an image, and the slot that holds it behind its control area."""

    begin: int
    nbytes: int
    slot: int
    control_bytes: int = 0

    @property
    def end(self) -> int:
        """Where the next wave begins."""
        return self.begin + self.nbytes


@dataclass(frozen=True)
class WriteWave:
    """Write a wave to its place in the file. ``first``: make the file, and reserve all of its blocks."""

    wave: Wave
    first: bool


@dataclass(frozen=True)
class FreeSlot:
    """The slot is the client's again."""

    slot: int


@dataclass(frozen=True)
class AllWritten:
    """Every byte of the image is in the file; nothing is durable before the file is synced."""


Action = WriteWave | FreeSlot | AllWritten


def part_of(seal: Sealed | WaveSealed) -> tuple[int, int]:
    """Return which part of its image a sealed slot holds: where it begins, and its length in bytes."""
    if isinstance(seal, WaveSealed):
        return seal.begin, seal.nbytes
    return (seal.wave_begin, seal.wave_bytes) if seal.wave_bytes else (0, seal.image_bytes)


def cut(image_bytes: int, wave_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield begin and end of each wave of an image, in file order; all but the last are of ``wave_bytes``."""
    for begin in range(0, image_bytes, wave_bytes):
        yield begin, min(begin + wave_bytes, image_bytes)


@dataclass
class WaveRing:
    """One rank's image on its way through the slots.

    The first wave that comes makes the file, and the others wait for it: a later wave must find a file, so that one
    which vanished meanwhile is an error and no file full of holes.

    Args:
        image_bytes: Size of the image.
    """

    image_bytes: int
    written_bytes: int = 0
    _end_of: dict[int, int] = field(default_factory=dict)  # of each wave heard of, by its begin
    _held: dict[int, Wave] = field(default_factory=dict)  # staged, not yet written
    _waiting: list[Wave] = field(default_factory=list)
    _first: int | None = None  # begin of the wave that makes the file

    @property
    def staged_bytes(self) -> int:
        """How much of the image was heard of."""
        return sum(end - begin for begin, end in self._end_of.items())

    @property
    def held_slots(self) -> list[int]:
        """Slots that are not the client's."""
        return [wave.slot for wave in self._held.values()]

    def has_heard_of(self, wave: Wave) -> bool:
        """Return whether a wave was staged before; it may be written since."""
        return self._end_of.get(wave.begin) == wave.end

    def staged(self, wave: Wave) -> list[Action]:
        """Take a staged wave.

        Raises:
            BadMessage: It is no part of the image, or overlaps another wave.
        """
        if self.has_heard_of(wave):
            return []  # heard twice: by message and by the slot's control area
        if not 0 <= wave.begin < wave.end <= self.image_bytes:
            raise BadMessage(f"a wave of bytes {wave.begin} to {wave.end} of an image of {self.image_bytes}")
        if any(begin < wave.end and wave.begin < end for begin, end in self._end_of.items()):
            raise BadMessage(f"a wave of bytes {wave.begin} to {wave.end}, which overlaps another one")
        self._end_of[wave.begin] = wave.end
        self._held[wave.begin] = wave
        if self._first is None:
            self._first = wave.begin
            return [WriteWave(wave, first=True)]
        if self._first in self._held:
            self._waiting.append(wave)
            return []
        return [WriteWave(wave, first=False)]

    def written(self, begin: int) -> list[Action]:
        """Take the report that a wave is in the file."""
        wave = self._held.pop(begin, None)
        if wave is None:
            return []  # said already
        self.written_bytes += wave.nbytes
        actions: list[Action] = [FreeSlot(wave.slot)]
        if begin == self._first:
            actions += [WriteWave(waiting, first=False) for waiting in self._waiting]
            self._waiting.clear()
        return [*actions, AllWritten()] if self.written_bytes == self.image_bytes else actions
