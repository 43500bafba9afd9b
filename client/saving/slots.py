"""The client's side of its arena: which slots are free, and what they are dressed for.

Invariant: a slot is given out only after the daemon has said that it needs it no longer.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Literal

from ckptd.client.saving.layout import RankLayout
from ckptd.protocol.errors import CkptdError, SaveSkipped, SlotsBusy
from ckptd.staging.arena import ArenaView, SlotState
from ckptd.staging.pin import PinnedRanges, pin
from ckptd.staging.views import DressedSlot

OnBusy = Literal["wait", "skip", "fail"]


@dataclass(eq=False)
class Slot:
    """One slot, and the layout that it is dressed for."""

    arena: ArenaView
    number: int
    free: bool = True
    sealed: bool = False  # it is the daemon's
    freed_at: int = 0  # a count: the slot that is free for the longest time is taken next
    layout: RankLayout | None = None
    _dressed: DressedSlot | None = field(default=None, repr=False)

    def dress(self, layout: RankLayout) -> DressedSlot:
        """Return the slot with the layout's records in place."""
        if self._dressed is None or self.layout is not layout:
            begin = self.arena.offset(self.number) + layout.control_bytes
            self._dressed = DressedSlot(self.arena.memory, begin, layout.image_bytes, layout.placed)
            self.layout = layout
        return self._dressed

    def undress(self) -> None:
        """Forget what the slot was dressed for: other bytes come over its records."""
        self.layout = self._dressed = None

    def set_state(self, state: SlotState, *, sequence: int = 0, seal: bytes = b"") -> None:
        """Write the state where the daemon sees it."""
        self.arena.set_state(self.number, state, sequence=sequence, seal=seal)

    def end_retention(self) -> None:
        """Say that the slot holds no committed image any more, before a byte of it changes: loads may be reading it."""
        if self.arena.state(self.number) is SlotState.RETAINED:
            self.set_state(SlotState.FREE)

    def seal(self, seal: bytes, *, sequence: int) -> None:
        """Give the slot to the daemon; the seal stands in its control area, too."""
        self.set_state(SlotState.SEALED, sequence=sequence, seal=seal)
        self.sealed = True


class Slots:
    """The slots of the current arena."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._slots: list[Slot] = []
        self._arena: ArenaView | None = None
        self._pinned: PinnedRanges | None = None
        self._error: CkptdError | None = None
        self._times_freed = 0

    @property
    def slot_bytes(self) -> int:
        """Size of a slot in bytes; 0 before there is an arena."""
        return 0 if self._arena is None else self._arena.slot_bytes

    def adopt(self, arena: ArenaView, *, touch_threads: int) -> None:
        """Take a new arena into use: touch its pages, pin them where there is CUDA."""
        self.drop()
        arena.touch(threads=touch_threads)
        self._pinned = pin(arena.address, len(arena.memory))
        with self._changed:
            self._arena = arena
            self._slots = [Slot(arena, number) for number in range(arena.slots)]

    def drop(self, *, orphaned: bool = False) -> None:
        """Forget the arena; the daemon keeps what it still writes.

        Args:
            orphaned: There is no daemon any more. Unless a slot is sealed, for one that may come, the file goes.
        """
        with self._changed:
            arena, self._arena, slots = self._arena, None, self._slots
            self._slots = []
        if arena is not None and orphaned and not any(slot.sealed for slot in slots):
            arena.remove_file()
        if self._pinned is not None:
            self._pinned.release()
            self._pinned = None
        if arena is not None:
            arena.close()

    def acquire(self, *, on_busy: OnBusy, timeout_s: float, checkpoint_id: str, rank: int) -> Slot:
        """Return a free slot, which is the caller's until :meth:`freed`.

        Raises:
            SlotsBusy: None became free in time, or at once with ``on_busy="fail"``.
            SaveSkipped: None is free and ``on_busy`` is "skip".
            CkptdError: The session ended while waiting.
        """
        begun = time.monotonic()
        with self._changed:
            while True:
                if self._error is not None:
                    raise self._error
                # The oldest: the newest may hold the last committed image, from which loads read.
                slot = min((slot for slot in self._slots if slot.free), key=lambda slot: slot.freed_at, default=None)
                if slot is not None:
                    slot.free = False
                    slot.end_retention()
                    return slot
                waited_s = time.monotonic() - begun
                if on_busy == "skip":
                    raise SaveSkipped(checkpoint_id, rank)
                if on_busy == "fail" or waited_s >= timeout_s:
                    raise SlotsBusy(len(self._slots), waited_s)
                self._changed.wait(timeout_s - waited_s)

    def wait_all_free(self, *, timeout_s: float) -> None:
        """Wait until nothing is being written from the arena. Raises SlotsBusy."""
        with self._changed:
            done = self._changed.wait_for(
                lambda: self._error is not None or all(slot.free for slot in self._slots), timeout_s
            )
            if self._error is not None:
                raise self._error
            if not done:
                raise SlotsBusy(len(self._slots), timeout_s)

    def freed(self, arena: int, number: int) -> None:
        """The daemon needs a slot no longer; one of an arena that was dropped is ignored."""
        with self._changed:
            for slot in self._slots:
                if (slot.arena.arena, slot.number) == (arena, number):
                    self._free(slot)

    def look_again(self) -> None:
        """Find slots that a daemon has freed without being able to tell us: the state stands in the arena."""
        with self._changed:
            for slot in self._slots:
                if slot.sealed and slot.arena.state(slot.number) in {SlotState.FREE, SlotState.RETAINED}:
                    self._free(slot)

    def _free(self, slot: Slot) -> None:
        slot.free, slot.sealed = True, False
        self._times_freed += 1
        slot.freed_at = self._times_freed
        self._changed.notify_all()

    def release(self, slot: Slot) -> None:
        """Give a slot back that was never sealed."""
        slot.set_state(SlotState.FREE)
        self.freed(slot.arena.arena, slot.number)

    def fail(self, error: CkptdError) -> None:
        """The session is over: nobody waits any more."""
        with self._changed:
            self._error = error
            self._changed.notify_all()
