"""Pages are locked in ranges, and unlocked exactly once."""

from __future__ import annotations

import ctypes
import logging
import mmap

import pytest
import torch
from support.streams import FakeRegistrar

from ckptd.staging.pin import CudaRegistrar, PinnedRanges, pin

GiB = 1 << 30
BASE = 0x7F00_0000_0000


def test_an_arena_is_locked_in_ranges_that_tile_it():
    registrar = FakeRegistrar()
    pinned = PinnedRanges(BASE, 2 * GiB + 8192, registrar=registrar)
    assert registrar.locked == {BASE: GiB, BASE + GiB: GiB, BASE + 2 * GiB: 8192}
    assert pinned.ranges == 3


def test_a_small_arena_is_one_range():
    registrar = FakeRegistrar()
    PinnedRanges(BASE, 4096, registrar=registrar)
    assert registrar.locked == {BASE: 4096}


def test_what_cannot_be_locked_stays_as_it_is_and_no_more_is_tried(caplog):
    registrar = FakeRegistrar(limit=1)
    with caplog.at_level(logging.WARNING):
        pinned = PinnedRanges(BASE, 4 * GiB, registrar=registrar)
    assert pinned.ranges == 1
    assert registrar.log == [("register", BASE), ("register", BASE + GiB)]
    [record] = caplog.records
    assert record.getMessage() == f"pinned {GiB} of {4 * GiB} bytes (error 2): staging is slower"


@pytest.mark.parametrize("limit", [0, 1, 9])
def test_releasing_unlocks_what_was_locked_once(limit):
    registrar = FakeRegistrar(limit=limit)
    pinned = PinnedRanges(BASE, 3 * GiB, registrar=registrar)
    for _ in range(2):
        pinned.release()
        assert registrar.locked == {}
        assert pinned.ranges == 0
    assert sum(call == "unregister" for call, _ in registrar.log) == min(limit, 3)


@pytest.mark.parametrize(("available", "initialized"), [(False, False), (True, False)])
def test_a_process_that_does_not_use_cuda_locks_nothing(monkeypatch, available, initialized):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialized)
    assert pin(BASE, 4096) is None


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
class TestCuda:
    @pytest.fixture
    def memory(self):
        torch.cuda.init()
        memory = mmap.mmap(-1, 4 << 20)
        yield memory
        memory.close()

    def test_locked_memory_is_seen_as_pinned_until_it_is_released(self, memory):
        tensor = torch.frombuffer(memory, dtype=torch.uint8)
        pinned = pin(tensor.data_ptr(), len(memory))
        assert pinned is not None
        assert pinned.ranges == 1
        assert tensor.is_pinned()
        pinned.release()
        assert not tensor.is_pinned()
        del tensor

    def test_memory_is_not_locked_twice(self, memory):
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        registrar = CudaRegistrar()
        assert registrar.register(address, len(memory)) == 0
        assert registrar.register(address, len(memory)) != 0
        assert registrar.unregister(address) == 0
        assert registrar.unregister(address) != 0
