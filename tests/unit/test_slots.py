"""Slots are given out one save at a time, and never before the daemon is done with them."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
from support.plans import Held, local_plan

from ckptd.client.saving.layout import make_rank_layout
from ckptd.client.saving.slots import Slots
from ckptd.protocol.errors import DaemonLost, SaveSkipped, SlotsBusy
from ckptd.staging.arena import ArenaView, SlotState, create_arena, read_slot, write_slot_state

SLOT_BYTES = 32 * 4096


def arena(tmp_path, number: int = 1) -> tuple[ArenaView, int]:
    descriptor = create_arena(str(tmp_path / f"{number}"), slots=2, slot_bytes=SLOT_BYTES)
    return ArenaView(descriptor, arena=number, slots=2, slot_bytes=SLOT_BYTES), os.dup(descriptor)


@pytest.fixture
def opened(tmp_path):
    view, descriptor = arena(tmp_path)
    slots = Slots()
    slots.adopt(view, touch_threads=1)
    yield slots, descriptor
    slots.drop()
    os.close(descriptor)


@pytest.fixture
def slots(opened):
    return opened[0]


def take(slots, on_busy="fail", timeout_s=0.0):
    return slots.acquire(on_busy=on_busy, timeout_s=timeout_s, checkpoint_id="/runs/7", rank=3)


def test_each_slot_is_given_out_once(slots):
    assert {take(slots).number, take(slots).number} == {0, 1}
    with pytest.raises(SlotsBusy) as caught:
        take(slots)
    assert caught.value.slots == 2


def test_a_save_may_be_skipped(slots):
    take(slots), take(slots)
    with pytest.raises(SaveSkipped) as caught:
        take(slots, "skip")
    assert caught.value.report().facts == {"checkpoint_id": "/runs/7", "rank": 3}


def test_a_save_that_waits_gets_the_slot_that_the_daemon_frees(slots):
    take(slots), take(slots)
    got = []
    waiting = threading.Thread(target=lambda: got.append(take(slots, "wait", 10.0)))
    waiting.start()
    slots.freed(1, 1)
    waiting.join(10)
    assert [slot.number for slot in got] == [1]


def test_waiting_has_a_deadline(slots):
    take(slots), take(slots)
    with pytest.raises(SlotsBusy) as caught:
        take(slots, "wait", 0.001)
    assert caught.value.waited_s >= 0.001


def test_the_end_of_the_session_ends_all_waits_with_its_cause(slots):
    take(slots), take(slots)
    error, raised = DaemonLost("/run"), []

    def wait():
        with pytest.raises(DaemonLost) as caught:
            take(slots, "wait", 10.0)
        raised.append(caught.value)

    waiting = threading.Thread(target=wait)
    waiting.start()
    slots.fail(error)
    waiting.join(10)
    assert raised == [error]
    for call in (lambda: take(slots), lambda: slots.wait_all_free(timeout_s=0)):
        with pytest.raises(DaemonLost):
            call()


def test_news_of_a_slot_of_another_arena_frees_nothing(slots):
    take(slots), take(slots)
    slots.freed(7, 0)
    with pytest.raises(SlotsBusy):
        take(slots)


def test_an_arena_is_idle_when_all_its_slots_are_free(slots):
    slots.wait_all_free(timeout_s=0)
    slot = take(slots)
    with pytest.raises(SlotsBusy):
        slots.wait_all_free(timeout_s=0)
    slots.release(slot)
    slots.wait_all_free(timeout_s=0)


def test_a_slot_that_is_released_says_so_to_the_daemon(opened):
    slots, descriptor = opened
    slot = take(slots)
    slot.set_state(SlotState.STAGING, sequence=5)
    assert read_slot(descriptor, slot.number) == (SlotState.STAGING, 0, 5)
    slots.release(slot)
    assert read_slot(descriptor, slot.number)[0] is SlotState.FREE


def test_a_new_arena_takes_the_place_of_the_old_one(slots, tmp_path):
    take(slots)
    view, descriptor = arena(tmp_path, 2)
    slots.adopt(view, touch_threads=1)
    assert {take(slots).arena.arena, take(slots).arena.arena} == {2}
    slots.freed(1, 0)
    with pytest.raises(SlotsBusy):
        take(slots)
    os.close(descriptor)


def test_without_an_arena_there_is_no_room():
    slots = Slots()
    assert slots.slot_bytes == 0
    slots.wait_all_free(timeout_s=0)
    slots.drop()
    with pytest.raises(SlotsBusy):
        take(slots)


def rank_layout(held):
    plan = local_plan(held)
    return make_rank_layout(("structure",), "digest", plan, np.arange(plan.items, dtype="<i8").tobytes())


class TestDressing:
    def test_a_slot_is_dressed_once_for_a_layout(self, slots):
        slot, layout = take(slots), rank_layout({"w": Held((4, 4)), "o": 512})
        dressed = slot.dress(layout)
        dressed.targets[0].fill_(7)
        assert slot.dress(layout) is dressed
        other = rank_layout({"w": Held((2, 2))})
        assert slot.dress(other) is not dressed
        assert slot.dress(layout) is not dressed

    def test_the_image_begins_behind_the_room_for_the_seal(self, slots):
        layout = rank_layout({f"o{n}": 256 for n in range(2000)})
        assert layout.control_bytes % 4096 == 0
        assert layout.control_bytes >= 8192 + 8 * 2000
        layout = rank_layout({"w": Held((1024,))})
        slot = take(slots)
        slot.dress(layout).targets[0].fill_(1.0)
        begin = slot.arena.offset(slot.number) + layout.control_bytes
        data = begin + layout.placed[0].data_offset
        assert slot.arena.memory[data : data + 4096] == np.ones(1024, "<f4").tobytes()
        slot.set_state(SlotState.SEALED, seal=b"s" * layout.control_bytes)
        assert slot.arena.memory[data : data + 4096] == np.ones(1024, "<f4").tobytes()
        assert layout.slot_bytes == layout.control_bytes + layout.image_bytes

    def test_only_assigned_items_are_placed(self):
        plan = local_plan({"a": Held((2,)), "o": 256, "b": Held((3, 4), (((1, 0), (2, 4)),), dtype="bfloat16")})
        layout = make_rank_layout(("structure",), "digest", plan, np.array([1, 2], "<i8").tobytes())
        assert layout.items == [1, 2]
        assert [(str(item.dtype), item.shape) for item in layout.placed] == [("None", ()), ("torch.bfloat16", (2, 4))]


def test_a_slot_that_is_taken_holds_no_committed_image_from_then_on(opened):
    slots, descriptor = opened
    for number in range(2):
        slots._arena.set_state(number, SlotState.RETAINED, sequence=5)
    slot = take(slots)
    assert read_slot(descriptor, slot.number)[0] is SlotState.FREE
    assert read_slot(descriptor, 1 - slot.number) == (SlotState.RETAINED, 0, 5)


def test_the_slot_that_is_free_for_the_longest_time_is_taken_next(slots):
    first, second = take(slots), take(slots)
    for slot in (second, first, second):
        slots.freed(1, slot.number)
        assert take(slots) is slot
    slots.freed(1, first.number)
    slots.freed(1, second.number)
    assert take(slots) is first


@pytest.mark.parametrize("state", SlotState)
def test_what_a_daemon_freed_without_a_word_is_found_in_the_arena(opened, state):
    slots, descriptor = opened
    sealed, held = take(slots), take(slots)
    sealed.seal(b"seal", sequence=5)
    assert read_slot(descriptor, sealed.number) == (SlotState.SEALED, 4, 5)
    write_slot_state(descriptor, sealed.number, state, 5)
    slots.look_again()
    free = [slot for slot in slots._slots if slot.free]
    assert free == ([sealed] if state in {SlotState.FREE, SlotState.RETAINED} else [])
    assert held not in free  # being filled: its state word says FREE until the first byte is on its way


def test_an_orphaned_arena_is_removed_unless_it_holds_a_sealed_save(tmp_path):
    for number, seal in ((1, b""), (2, b"seal")):
        view, descriptor = arena(tmp_path, number)
        slots = Slots()
        slots.adopt(view, touch_threads=1)
        if seal:
            take(slots).seal(seal, sequence=1)
        slots.drop(orphaned=True)
        assert (tmp_path / str(number)).exists() == bool(seal)
        os.close(descriptor)


def test_an_arena_that_is_dropped_in_order_is_the_daemons_to_remove(opened, tmp_path):
    slots, _ = opened
    slots.drop()
    assert (tmp_path / "1").exists()
