"""Through a ring of small slots goes the whole image, range by range, hashed as it goes."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
import torch
from support.plans import Held, local_plan
from support.streams import DEVICE, HeldStream
from xxhash import xxh3_64_intdigest

from ckptd.checkpoint.image.frame import frame_hash, frame_ranges
from ckptd.client.saving.layout import make_rank_layout
from ckptd.client.saving.slots import Slots
from ckptd.client.saving.waves import Ring, WaveSave, stage_in_waves
from ckptd.protocol import messages
from ckptd.protocol.errors import SaveSkipped, SlotsBusy, SlotTooSmall
from ckptd.protocol.messages import Sealed
from ckptd.staging import copy as copy_module
from ckptd.staging.arena import ArenaView, SlotState, create_arena, read_seal, read_slot
from ckptd.staging.copy import Copier

PAGE = 4096
SLOT_BYTES = 10 * PAGE  # of which the seal takes eight


class FakeDaemon:
    """Takes waves out of the slots into an image, and gives the slots back at once, or when it is told to."""

    def __init__(self, slots: Slots, image_bytes: int, descriptor: int) -> None:
        self.image = bytearray(b"\xee" * image_bytes)
        self.heard = []
        self.frees = True
        self._slots, self._descriptor = slots, descriptor

    def take(self, body: bytes) -> None:
        wave = messages.decode_client_message(body)
        assert read_seal(self._descriptor, wave.slot, SLOT_BYTES) == body  # it outlives the trainer
        self.heard.append(wave)
        self.copy(wave.slot, wave.control_bytes, wave.begin, wave.nbytes)
        if self.frees:
            self._slots.freed(wave.arena, wave.slot)

    def copy(self, slot: int, control_bytes: int, begin: int, nbytes: int) -> None:
        at = PAGE + slot * SLOT_BYTES + control_bytes
        self.image[begin : begin + nbytes] = os.pread(self._descriptor, nbytes, at)


class Staging:
    """A session's part of a save in waves."""

    def __init__(self, tmp_path, held, sources) -> None:
        plan = local_plan(held)
        self.layout = make_rank_layout(("s",), "digest", plan, np.arange(plan.items, dtype="<i8").tobytes())
        self.sources, self.slots, self.ended = sources, Slots(), False
        descriptor = create_arena(str(tmp_path / "arena"), slots=2, slot_bytes=SLOT_BYTES)
        self.descriptor = os.dup(descriptor)
        self.slots.adopt(ArenaView(descriptor, arena=7, slots=2, slot_bytes=SLOT_BYTES), touch_threads=1)
        self.daemon = FakeDaemon(self.slots, self.layout.image_bytes, self.descriptor)
        self.copier = Copier(threads=1)

    def run(self, *, on_busy="wait", timeout_s=5.0):
        save = WaveSave(3, "/runs/7", 0, on_busy, timeout_s, lambda: self.ended)
        return stage_in_waves(save, self.layout, self.sources, Ring(self.slots, self.copier, self.daemon.take))

    def finish(self, staged) -> bytes:
        """Return the whole image, of which the daemon has got all but the last wave."""
        self.daemon.copy(staged.slot.number, staged.control_bytes, staged.begin, staged.nbytes)
        return bytes(self.daemon.image)

    def states(self):
        return [read_slot(self.descriptor, slot)[0] for slot in (0, 1)]


@pytest.fixture
def staging(tmp_path):
    opened = []

    def make(held, sources):
        opened.append(Staging(tmp_path, held, sources))
        return opened[-1]

    yield make
    for one in opened:
        one.slots.drop()
        one.copier.close()
        os.close(one.descriptor)


HELD = {
    "w": Held((9 * 1024,)),
    "small": Held((3, 5)),
    "o": 9000,
    "empty": Held((0,)),
    "last": Held((5000,), dtype="uint8"),
}


def sources():
    return [torch.randn(9 * 1024), torch.randn(5, 3).t(), os.urandom(8000), torch.empty(0), torch.arange(5000).byte()]


@pytest.fixture
def staged_once(staging):
    return staging(HELD, sources())


def payloads(staging):
    for item, source in zip(staging.layout.placed, staging.sources, strict=True):
        yield item.data_offset, len(source) if isinstance(source, bytes) else item.data_bytes


def test_the_image_and_its_hashes_come_out_whole(staged_once):
    staged = staged_once.run()
    image = staged_once.finish(staged)
    for (begin, nbytes), source in zip(payloads(staged_once), staged_once.sources, strict=True):
        held = source if isinstance(source, bytes) else source.contiguous().numpy().tobytes()
        assert image[begin : begin + nbytes] == held
    wanted = [xxh3_64_intdigest(image[begin : begin + nbytes]) for begin, nbytes in payloads(staged_once)]
    assert np.frombuffer(staged.hashes, "<u8").tolist() == wanted
    offsets, lengths = (np.array(column) for column in zip(*payloads(staged_once), strict=True))
    ranges = frame_ranges(offsets, lengths, len(image))
    assert staged.frame_hash == frame_hash(ranges, lambda begin, end: image[begin:end])
    assert staged.object_bytes == (8000).to_bytes(8, "little")


def test_waves_tile_the_image_and_all_but_the_last_are_sealed(staged_once):
    staged = staged_once.run()
    heard = staged_once.daemon.heard
    assert len(heard) > 5
    begins = [wave.begin for wave in heard] + [staged.begin]
    ends = [wave.begin + wave.nbytes for wave in heard] + [staged.begin + staged.nbytes]
    assert [0, *ends[:-1]] == begins
    assert ends[-1] == staged_once.layout.image_bytes
    assert {(w.sequence, w.checkpoint_id, w.digest, w.arena, w.image_bytes) for w in heard} == {
        (3, "/runs/7", "digest", 7, staged_once.layout.image_bytes)
    }
    last = staged.put_into(Sealed(3, "/runs/7", "digest", 7, 0, 8192, 1, b"", 0, 0, 0))
    assert (last.wave_begin, last.wave_bytes, last.hashes) == (staged.begin, staged.nbytes, staged.hashes)
    assert (last.control_bytes, last.frame_hash) == (staged.control_bytes, staged.frame_hash)


def test_the_seal_of_the_last_wave_has_room_before_it(staging):
    one = staging({f"w{n}": Held((2,)) for n in range(300)}, [torch.zeros(2)] * 300)
    control_bytes = one.run().control_bytes
    assert control_bytes >= one.layout.control_bytes + 8 * 300
    assert control_bytes % PAGE == 0


def test_a_full_ring_is_waited_for(staged_once):
    staged_once.daemon.frees = False
    done = []
    thread = threading.Thread(target=lambda: done.append(staged_once.run()))
    thread.start()
    while thread.is_alive():
        for wave in staged_once.daemon.heard:
            staged_once.slots.freed(7, wave.slot)
        thread.join(0.001)
    assert staged_once.finish(done[0])[:1] != b"\xee"


def test_a_ring_that_stays_full_ends_the_save_in_time(staged_once):
    staged_once.daemon.frees = False
    with pytest.raises(SlotsBusy):
        staged_once.run(timeout_s=0.05)
    assert len(staged_once.daemon.heard) == 2


def test_a_busy_policy_is_for_the_first_wave_alone(staged_once):
    taken = [staged_once.slots.acquire(on_busy="fail", timeout_s=0, checkpoint_id="/x", rank=0) for _ in range(2)]
    with pytest.raises(SaveSkipped):
        staged_once.run(on_busy="skip")
    staged_once.slots.release(taken[0])
    staged_once.run(on_busy="skip", timeout_s=5.0)


def test_a_save_that_has_ended_meanwhile_is_staged_no_further(staged_once):
    staged_once.ended = True
    assert staged_once.run() is None
    assert staged_once.daemon.heard == []
    assert staged_once.states() == [SlotState.FREE] * 2


def test_a_copy_that_fails_gives_its_slot_back(staged_once):
    def copy(pairs):
        raise RuntimeError("out of device memory")

    staged_once.copier.copy = copy
    with pytest.raises(RuntimeError, match="out of device memory"):
        staged_once.run()
    assert staged_once.states() == [SlotState.FREE] * 2
    staged_once.slots.wait_all_free(timeout_s=0)


def test_a_slot_without_room_for_a_page_is_refused_with_the_numbers(staging):
    one = staging({f"o{n}": 8 for n in range(2000)}, [b"x"] * 2000)
    with pytest.raises(SlotTooSmall) as caught:
        one.run()
    assert caught.value.slot_bytes == SLOT_BYTES < caught.value.wanted_bytes


def test_a_slot_is_dressed_anew_after_waves_went_through_it(staged_once, staging):
    small = make_rank_layout(("s",), "d", local_plan({"w": Held((4,))}), np.arange(1, dtype="<i8").tobytes())
    slot = staged_once.slots.acquire(on_busy="fail", timeout_s=0, checkpoint_id="/x", rank=0)
    dressed = slot.dress(small)
    staged_once.slots.release(slot)
    staged_once.run()
    assert slot.dress(small) is not dressed


def test_device_tensors_are_in_the_slot_before_it_is_hashed_and_sealed(staging, monkeypatch):
    stream = HeldStream()
    stream.released.set()
    monkeypatch.setattr(copy_module, "make_side_stream", lambda device: stream)
    one = staging({"w": Held((6 * 1024,))}, [torch.empty(6 * 1024, device=DEVICE)])
    staged = one.run()
    image, [(begin, nbytes)] = one.finish(staged), payloads(one)
    ones = torch.ones(6 * 1024).numpy().tobytes()
    assert image[begin : begin + nbytes] == ones
    assert np.frombuffer(staged.hashes, "<u8").tolist() == [xxh3_64_intdigest(ones)]
    assert stream.calls.count("wait") == stream.calls.count("copy") >= 3
