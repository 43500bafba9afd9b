"""Stages an image that is larger than the arena: range by range, through the slots, as fast as they are written.

The trainer is held until the last range is staged; memory stays that of the slots. Each range is hashed here, in its
slot, while the one before it is written: so a worker keeps nothing that could be lost with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from ckptd.checkpoint.image.hashes import ImageHashes
from ckptd.client.saving.layout import RankLayout
from ckptd.client.saving.slots import OnBusy, Slot, Slots
from ckptd.protocol import messages
from ckptd.protocol.errors import SlotTooSmall
from ckptd.protocol.messages import Sealed
from ckptd.protocol.wave_messages import WaveSealed
from ckptd.protocol.waves import cut
from ckptd.staging.arena import ALIGNMENT_BYTES, SlotState
from ckptd.staging.copy import Copier
from ckptd.staging.waves import Source, WaveFiller

# A disk of 2 to 4 GB/s takes some 20 ms for so much: a hundred times what a message there and back costs.
WAVE_SLOT_BYTES: Final = 64 << 20


@dataclass(frozen=True)
class WaveSave:
    """The save that is staged.

    Attributes:
        sequence: Its number.
        checkpoint_id: Where it will be published.
        rank: Ours.
        on_busy: What to do if no slot is free for its first wave; later ones always wait.
        timeout_s: How long to wait for a slot.
        has_ended: Tells whether it has failed meanwhile, on another rank perhaps.
    """

    sequence: int
    checkpoint_id: str
    rank: int
    on_busy: OnBusy
    timeout_s: float
    has_ended: Callable[[], bool]


@dataclass(frozen=True)
class Ring:
    """What a wave goes through: the slots, who copies into them, and the line to the daemon."""

    slots: Slots
    copier: Copier
    send: Callable[[bytes], None]


@dataclass(frozen=True)
class Staged:
    """An image of which all is staged and all but the last wave is sealed.

    Attributes:
        slot: Where the last wave lies.
        begin: Where it begins in the image.
        nbytes: Its length.
        control_bytes: Room before it in the slot.
        object_bytes: Column of the objects' lengths.
        hashes: Column of the items' hashes.
        frame_hash: Hash of all other bytes.
        stage_s: Seconds it all took.
    """

    slot: Slot
    begin: int
    nbytes: int
    control_bytes: int
    object_bytes: bytes
    hashes: bytes
    frame_hash: int
    stage_s: float

    def put_into(self, seal: Sealed) -> Sealed:
        """Return the seal of an image as one that tells of waves."""
        return msgspec.structs.replace(
            seal,
            control_bytes=self.control_bytes,
            wave_begin=self.begin,
            wave_bytes=self.nbytes,
            hashes=self.hashes,
            frame_hash=self.frame_hash,
        )


def stage_in_waves(save: WaveSave, layout: RankLayout, sources: Sequence[Source], ring: Ring) -> Staged | None:
    """Stage an image through the slots and seal all but its last wave.

    Args:
        save: What is staged.
        layout: Where everything goes in the image.
        sources: What a snapshot holds, by the layout's positions.
        ring: What it goes through.

    Returns:
        What is left to be sealed; None if the save has ended meanwhile.

    Raises:
        SlotTooSmall: A slot has no room for a page of the image beside the seal.
        CkptdError: No slot became free; what was staged is given up with the save.
    """
    begun = time.monotonic()
    waves = _Waves(save, layout, [sources[item] for item in layout.items], ring)
    for begin, end in cut(layout.image_bytes, waves.wave_bytes):
        slot = waves.fill(begin, end)
        if save.has_ended():
            ring.slots.release(slot)
            return None
        if end < layout.image_bytes:
            waves.seal(slot, begin, end)
    hashes = waves.hashes.items.astype("<u8").tobytes()
    last = (slot, begin, end - begin, waves.control_bytes)
    return Staged(*last, waves.object_bytes, hashes, waves.hashes.frame, time.monotonic() - begun)


class _Waves:
    """One image on its way."""

    def __init__(self, save: WaveSave, layout: RankLayout, sources: Sequence[Source], ring: Ring) -> None:
        self._save, self._layout, self._ring = save, layout, ring
        self._filler = WaveFiller(layout.placed, sources)
        objects = [len(source) if isinstance(source, bytes) else None for source in sources]
        lengths = [p.data_bytes if n is None else n for n, p in zip(objects, layout.placed, strict=True)]
        self.hashes = ImageHashes([placed.data_offset for placed in layout.placed], lengths)
        self.object_bytes = b"".join(length.to_bytes(8, "little") for length in objects if length is not None)
        # The last seal has a hash of each item beside what any seal has.
        hashes_bytes = -(-8 * len(sources) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        self.control_bytes = layout.control_bytes + hashes_bytes
        self.wave_bytes = (ring.slots.slot_bytes - self.control_bytes) // ALIGNMENT_BYTES * ALIGNMENT_BYTES
        if self.wave_bytes <= 0:
            raise SlotTooSmall(self.control_bytes + ALIGNMENT_BYTES, ring.slots.slot_bytes)

    def fill(self, begin: int, end: int) -> Slot:
        """Return a slot that holds a range of the image, all of it copied and hashed. Raises SlotsBusy."""
        save, slots = self._save, self._ring.slots
        on_busy: OnBusy = save.on_busy if begin == 0 else "wait"
        slot = slots.acquire(
            on_busy=on_busy, timeout_s=save.timeout_s, checkpoint_id=save.checkpoint_id, rank=save.rank
        )
        try:
            slot.undress()
            slot.set_state(SlotState.STAGING, sequence=save.sequence)
            memory, at = slot.arena.memory, slot.arena.offset(slot.number) + self.control_bytes
            self._ring.copier.copy(self._filler.fill(memory, at, begin, end))
            with memoryview(memory) as whole, whole[at : at + end - begin] as wave:
                self.hashes.update(wave)
        except BaseException:
            slots.release(slot)
            raise
        return slot

    def seal(self, slot: Slot, begin: int, end: int) -> None:
        """Hand a wave to the daemon."""
        seal = messages.encode(
            WaveSealed(
                sequence=self._save.sequence,
                checkpoint_id=self._save.checkpoint_id,
                digest=self._layout.digest,
                arena=slot.arena.arena,
                slot=slot.number,
                control_bytes=self.control_bytes,
                image_bytes=self._layout.image_bytes,
                begin=begin,
                nbytes=end - begin,
            )
        )
        slot.seal(seal, sequence=self._save.sequence)
        self._ring.send(seal)
