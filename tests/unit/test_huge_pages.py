"""An arena's pages are gathered into huge ones where the kernel can; what they hold stays."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
from pathlib import Path

import pytest

from ckptd.staging import huge_pages
from ckptd.staging.arena import ArenaView, arena_bytes, create_arena
from ckptd.staging.huge_pages import HUGE_BYTES, bring_into_huge_pages

SIZE = 3 * HUGE_BYTES + 4096


@pytest.fixture
def descriptor():
    descriptor = os.memfd_create("huge")  # lies on tmpfs, as arenas do
    os.posix_fallocate(descriptor, 0, SIZE)
    yield descriptor
    os.close(descriptor)


def huge_kib(descriptor):
    """Return how many KiB of a file a mapping takes in as huge pages; its address must suit its offset."""
    libc = huge_pages._libc
    base = libc.mmap(None, SIZE + HUGE_BYTES, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    begin = -(-base // HUGE_BYTES) * HUGE_BYTES
    libc.mmap(begin, SIZE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | 0x10, descriptor, 0)
    for page in range(3):
        ctypes.c_char.from_address(begin + page * HUGE_BYTES).value = b"x"
    smaps = Path("/proc/self/smaps").read_text().partition("memfd:huge")[2]
    libc.munmap(base, SIZE + HUGE_BYTES)
    return int(re.search(r"ShmemPmdMapped:\s+(\d+)", smaps)[1])


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_what_the_file_holds_stays(descriptor, threads):
    data = os.urandom(SIZE)
    os.pwrite(descriptor, data, 0)
    bring_into_huge_pages(descriptor, SIZE, threads=threads)
    assert os.pread(descriptor, SIZE, 0) == data
    assert os.fstat(descriptor).st_size == SIZE


def test_where_the_kernel_can_they_are_huge(descriptor):
    assert huge_kib(descriptor) == 0
    if not bring_into_huge_pages(descriptor, SIZE, threads=2):
        pytest.skip("this kernel gathers no pages of tmpfs, or memory is in pieces: MADV_COLLAPSE, Linux 6.1")
    assert huge_kib(descriptor) == 3 * HUGE_BYTES // 1024


def test_a_small_file_is_left_alone(descriptor, monkeypatch):
    monkeypatch.setattr(huge_pages, "_collapse", lambda *_: pytest.fail("nothing to gather"))
    assert not bring_into_huge_pages(descriptor, HUGE_BYTES - 1, threads=1)


def test_a_kernel_that_cannot_costs_nothing_but_speed(descriptor, monkeypatch):
    class Old:
        """A C library whose kernel knows no such advice."""

        mmap, munmap = huge_pages._libc.mmap, huge_pages._libc.munmap

        def madvise(self, *_):
            ctypes.set_errno(errno.EINVAL)
            return -1

    monkeypatch.setattr(huge_pages, "_libc", Old())
    assert not bring_into_huge_pages(descriptor, SIZE, threads=2)


def test_a_file_that_cannot_be_mapped_is_left_as_it_is(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * SIZE)
    descriptor = os.open(path, os.O_RDONLY)  # a writable mapping of it is refused
    assert not bring_into_huge_pages(descriptor, SIZE, threads=1)
    os.close(descriptor)


def test_no_mapping_is_left(descriptor):
    before = Path("/proc/self/maps").read_text().count("memfd:huge")
    bring_into_huge_pages(descriptor, SIZE, threads=2)
    assert Path("/proc/self/maps").read_text().count("memfd:huge") == before


def test_an_arena_keeps_its_header_and_its_slots(tmp_path):
    descriptor = create_arena("/dev/shm/ckptd-test-huge", slots=2, slot_bytes=2 * HUGE_BYTES)
    os.unlink("/dev/shm/ckptd-test-huge")
    os.pwrite(descriptor, b"seal", arena_bytes(1, 2 * HUGE_BYTES))
    head = os.pread(descriptor, 4096, 0)
    view = ArenaView(os.dup(descriptor), arena=1, slots=2, slot_bytes=2 * HUGE_BYTES)
    view.touch(threads=2)
    assert os.pread(descriptor, 4096, 0) == head
    assert os.pread(descriptor, 4, arena_bytes(1, 2 * HUGE_BYTES)) == b"seal"
    assert os.fstat(descriptor).st_blocks * 512 == arena_bytes(2, 2 * HUGE_BYTES)
    view.close()
    os.close(descriptor)
