"""Which images the daemon gives to whom."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from ckptd.daemon.job import retained
from ckptd.daemon.job.retained import open_images
from ckptd.daemon.session.sessions import ArenaFile, Peer
from ckptd.protocol.messages import ATTACH_FRAME_LIMIT_BYTES, encode
from ckptd.protocol.retained import IMAGES_AT_MOST, OpenRetained, RetainedImage, RetainedOpened
from ckptd.staging.arena import SlotState, create_arena, open_arena, write_slot_state

SLOT_BYTES = 4 * 4096
NOTHING = (RetainedOpened([]), [])
REQUEST = OpenRetained(2, "/runs/7", "save")


@pytest.fixture
def arenas(tmp_path):
    """Two ranks' arenas; the second slot of each holds an image."""
    made = []
    for rank in range(2):
        path = str(tmp_path / f"{rank}")
        descriptor = create_arena(path, slots=2, slot_bytes=SLOT_BYTES)
        write_slot_state(descriptor, 1, SlotState.RETAINED, 5)
        made.append(ArenaFile(rank + 1, path, descriptor, 2, SLOT_BYTES))
    yield made
    for arena in made:
        os.close(arena.descriptor)


def job_of(arenas, *, uid=1000, save_id="save"):
    message = SimpleNamespace(slot=1, control_bytes=4096, image_bytes=8192)
    seals = {rank: SimpleNamespace(message=message, arena=arena) for rank, arena in enumerate(arenas)}
    generation = SimpleNamespace(save_id=save_id, sequence=5, seals=seals)
    return holding(generation, uid)


def holding(generation, uid):
    saves = SimpleNamespace(outcomes=SimpleNamespace(retained=generation))
    return SimpleNamespace(owner=SimpleNamespace(uid=uid), saves=saves)


def ask(job, *, uid=1000, request=REQUEST):
    return open_images([holding(None, 1000), job], Peer(1, uid, uid), request)


def test_the_owner_gets_read_only_descriptors_of_all_ranks(arenas):
    opened, descriptors = ask(job_of(arenas))
    offset = 4096 + SLOT_BYTES + 4096
    assert opened.images == [RetainedImage(f"__{rank}_0.distcp", 1, 5, offset, 8192) for rank in range(2)]
    for descriptor, arena in zip(descriptors, arenas, strict=True):
        assert os.path.samestat(os.fstat(descriptor), os.fstat(arena.descriptor))
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(descriptor, b"x", 0)
        os.close(descriptor)


def test_another_user_gets_nothing(arenas):
    assert ask(job_of(arenas), uid=0) == NOTHING
    assert ask(job_of(arenas, uid=0), uid=1000) == NOTHING


def test_another_save_gets_nothing(arenas):
    assert ask(job_of(arenas, save_id="another")) == NOTHING


@pytest.mark.parametrize(
    ("state", "sequence"),
    [(SlotState.FREE, 5), (SlotState.STAGING, 6), (SlotState.SEALED, 6), (SlotState.RETAINED, 6)],
)
def test_a_save_that_one_rank_has_staged_over_is_gone(arenas, state, sequence):
    write_slot_state(arenas[1].descriptor, 1, state, sequence)
    assert ask(job_of(arenas)) == NOTHING


def test_memory_whose_name_was_removed_is_still_given(arenas):
    os.unlink(arenas[0].path)
    opened, descriptors = ask(job_of(arenas))
    assert len(opened.images) == len(descriptors) == 2
    for descriptor in descriptors:
        os.close(descriptor)
    assert open_arena(arenas[0].path, slots=2, slot_bytes=SLOT_BYTES) is None


def test_more_images_than_one_frame_takes_are_left_to_the_disk(arenas, monkeypatch):
    monkeypatch.setattr(retained, "IMAGES_AT_MOST", 1)
    assert ask(job_of(arenas)) == NOTHING
    images = [RetainedImage(f"__{rank}_0.distcp", 127, 2**40, 2**40, 2**40) for rank in range(IMAGES_AT_MOST)]
    assert len(encode(RetainedOpened(images))) < ATTACH_FRAME_LIMIT_BYTES


def test_a_daemon_without_descriptors_gives_nothing_and_keeps_none(arenas, monkeypatch):
    real, before = os.open, len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "open", _once(real))
    assert ask(job_of(arenas)) == NOTHING
    monkeypatch.undo()
    assert len(os.listdir("/proc/self/fd")) == before


def _once(real):
    calls = []

    def open_once(*args):
        calls.append(args)
        if len(calls) > 1:
            raise OSError(24, "Too many open files")
        return real(*args)

    return open_once
