"""Waves of an image, event by event."""

from __future__ import annotations

import pytest

from ckptd.protocol.errors import BadMessage
from ckptd.protocol.messages import Sealed
from ckptd.protocol.wave_messages import WaveSealed
from ckptd.protocol.waves import AllWritten, FreeSlot, Wave, WaveRing, WriteWave, cut, part_of

A, B, C = Wave(0, 10, 0), Wave(10, 10, 1), Wave(20, 5, 0)


@pytest.fixture
def ring():
    return WaveRing(25)


def test_waves_go_through_the_slots_one_after_the_other(ring):
    assert ring.staged(A) == [WriteWave(A, first=True)]
    assert ring.held_slots == [0]
    assert ring.written(0) == [FreeSlot(0)]
    assert ring.staged(B) == [WriteWave(B, first=False)]
    assert ring.staged(C) == [WriteWave(C, first=False)]
    assert (ring.staged_bytes, ring.written_bytes, ring.held_slots) == (25, 10, [1, 0])
    assert ring.written(20) == [FreeSlot(0)]
    assert ring.written(10) == [FreeSlot(1), AllWritten()]
    assert (ring.written_bytes, ring.held_slots) == (25, [])


def test_all_others_wait_for_the_wave_that_makes_the_file(ring):
    assert ring.staged(B) == [WriteWave(B, first=True)]  # whichever it is
    assert ring.staged(A) == ring.staged(C) == []
    assert ring.written(10) == [FreeSlot(1), WriteWave(A, first=False), WriteWave(C, first=False)]


def test_what_is_heard_twice_is_done_once(ring):
    ring.staged(A)
    assert ring.staged(A) == []
    assert ring.written(0) == [FreeSlot(0)]
    assert ring.staged(A) == ring.written(0) == []


@pytest.mark.parametrize("wave", [Wave(-5, 10, 1), Wave(20, 6, 1), Wave(25, 1, 1), Wave(5, 0, 1), Wave(30, -5, 1)])
def test_a_wave_that_is_no_part_of_the_image_is_refused(ring, wave):
    with pytest.raises(BadMessage, match=f"bytes {wave.begin} to {wave.end} of an image of 25"):
        ring.staged(wave)
    assert ring.held_slots == []


@pytest.mark.parametrize("wave", [Wave(5, 10, 1), Wave(10, 5, 1), Wave(9, 2, 1), Wave(0, 25, 1), Wave(15, 10, 1)])
def test_a_wave_that_overlaps_another_is_refused(ring, wave):
    ring.staged(B)
    with pytest.raises(BadMessage, match="overlaps"):
        ring.staged(wave)


@pytest.mark.parametrize(
    ("image_bytes", "wave_bytes", "waves"),
    [(0, 4, []), (4, 4, [(0, 4)]), (9, 4, [(0, 4), (4, 8), (8, 9)]), (3, 100, [(0, 3)])],
)
def test_an_image_is_cut_without_gap_or_overlap(image_bytes, wave_bytes, waves):
    assert list(cut(image_bytes, wave_bytes)) == waves


def test_a_seal_says_which_part_it_holds():
    seal = Sealed(1, "/a", "d", 1, 0, 8192, 12288, b"", 0, 0, 0)
    assert part_of(seal) == (0, 12288)
    last = Sealed(1, "/a", "d", 1, 0, 8192, 12288, b"", 0, 0, 0, wave_bytes=4096, wave_begin=8192)
    assert part_of(last) == (8192, 4096)
    assert part_of(WaveSealed(1, "/a", "d", 1, 0, 8192, 12288, 4096, 8192)) == (4096, 8192)
