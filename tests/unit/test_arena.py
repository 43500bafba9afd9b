"""An arena is a file: what stands in it, and what a client can do to it."""

from __future__ import annotations

import errno
import mmap
import os
import socket
import stat
import subprocess
import sys
import tempfile

import pytest

from ckptd.protocol.errors import BadMessage, ShmTooSmall, SystemCallFailed
from ckptd.staging import arena
from ckptd.staging.arena import (
    ALIGNMENT_BYTES,
    HEADER_BYTES,
    MAX_SLOTS,
    ArenaView,
    SlotState,
    arena_bytes,
    available_bytes,
    create_arena,
    discard_pages,
    hold,
    is_held,
    let_go,
    open_arena,
    read_seal,
    read_slot,
    slot_offset,
    write_slot_state,
)

SLOT_BYTES = 2 * ALIGNMENT_BYTES
SLOTS = 3


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "arena")


@pytest.fixture
def descriptor(path):
    descriptor = create_arena(path, slots=3, slot_bytes=SLOT_BYTES)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def view(descriptor):
    view = ArenaView(os.dup(descriptor), arena=1, slots=3, slot_bytes=SLOT_BYTES)
    yield view
    view.close()
    view.memory.close()


def test_the_file_is_private_and_has_all_its_pages(descriptor, path):
    status = os.stat(path)
    assert status.st_size == arena_bytes(3, SLOT_BYTES) == HEADER_BYTES + 3 * SLOT_BYTES
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_blocks * 512 >= status.st_size
    assert not os.get_inheritable(descriptor)


def test_the_header_says_what_the_file_is(descriptor):
    header = os.pread(descriptor, 24, 0)
    assert header == b"ckptd\0\0\1" + b"\1\0\0\0" + b"\3\0\0\0" + SLOT_BYTES.to_bytes(8, "little")


def test_slots_lie_one_behind_the_other_on_pages(view):
    offsets = [slot_offset(slot, SLOT_BYTES) for slot in range(3)]
    assert offsets == [view.offset(slot) for slot in range(3)] == [4096, 12288, 20480]


def test_new_slots_are_free(descriptor):
    assert [read_slot(descriptor, slot) for slot in range(3)] == [(SlotState.FREE, 0, 0)] * 3


@pytest.mark.parametrize("state", SlotState)
def test_the_daemon_sees_the_state_that_the_client_sets(view, descriptor, state):
    view.set_state(1, state, sequence=2**40)
    assert read_slot(descriptor, 1) == (state, 0, 2**40)
    assert read_slot(descriptor, 0) == read_slot(descriptor, 2) == (SlotState.FREE, 0, 0)


def test_the_state_that_the_daemon_sets_takes_the_seal_away(view, descriptor):
    view.set_state(2, SlotState.SEALED, sequence=7, seal=b"a seal")
    write_slot_state(descriptor, 2, SlotState.PERSISTING, 7)
    assert read_slot(descriptor, 2) == (SlotState.PERSISTING, 0, 7)
    assert read_seal(descriptor, 2, SLOT_BYTES) is None


def test_a_seal_of_a_gigabyte_is_none(view, descriptor):
    view.set_state(0, SlotState.SEALED, sequence=1, seal=b"first")
    view.memory[64 + 4 : 64 + 8] = (1 << 30).to_bytes(4, "little")
    os.ftruncate(descriptor, 2 << 30)
    assert read_seal(descriptor, 0, 2 << 30) is None


def test_a_seal_is_read_from_the_slot_that_it_stands_in(view, descriptor):
    view.set_state(0, SlotState.SEALED, sequence=1, seal=b"first")
    view.set_state(2, SlotState.SEALED, sequence=2, seal=b"third" * 900)
    assert read_seal(descriptor, 0, SLOT_BYTES) == b"first"
    assert read_seal(descriptor, 1, SLOT_BYTES) is None
    assert read_seal(descriptor, 2, SLOT_BYTES) == b"third" * 900


def test_a_seal_counts_only_while_the_state_says_so(view, descriptor):
    view.set_state(0, SlotState.STAGING, sequence=1, seal=b"half a se")
    assert read_seal(descriptor, 0, SLOT_BYTES) is None


def test_the_last_slot_of_the_largest_number_does_not_reach_the_first_slot(path):
    descriptor = create_arena(path, slots=MAX_SLOTS, slot_bytes=ALIGNMENT_BYTES)
    write_slot_state(descriptor, MAX_SLOTS - 1, SlotState.SEALED, 2**64 - 1)
    assert read_slot(descriptor, MAX_SLOTS - 1) == (SlotState.SEALED, 0, 2**64 - 1)
    assert os.pread(descriptor, ALIGNMENT_BYTES, HEADER_BYTES) == bytes(ALIGNMENT_BYTES)
    os.close(descriptor)


class TestWhatAClientMayDoToIt:
    @pytest.mark.parametrize("nbytes", [0, 64, 70, HEADER_BYTES, HEADER_BYTES + 5])
    def test_an_arena_cut_short_has_nothing_in_it_and_breaks_nothing(self, view, descriptor, nbytes):
        view.set_state(1, SlotState.SEALED, sequence=1, seal=b"seal")
        os.truncate(descriptor, nbytes)
        for slot in range(3):
            read_slot(descriptor, slot)
            assert not read_seal(descriptor, slot, SLOT_BYTES)
            write_slot_state(descriptor, slot, SlotState.FREE)

    def test_a_state_that_does_not_exist_is_free(self, descriptor):
        os.pwrite(descriptor, (9).to_bytes(4, "little"), 64)
        assert read_slot(descriptor, 0)[0] is SlotState.FREE

    @pytest.mark.parametrize("length", [0, SLOT_BYTES + 1, 2**32 - 1])
    def test_a_seal_longer_than_its_slot_is_none(self, descriptor, length):
        sealed = SlotState.SEALED.to_bytes(4, "little")
        os.pwrite(descriptor, sealed + length.to_bytes(4, "little"), 64)
        assert read_seal(descriptor, 0, SLOT_BYTES) is None


def test_pages_of_an_arena_that_is_given_up_go_though_it_is_mapped():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        descriptor = create_arena(f"{folder}/arena", slots=4, slot_bytes=SLOT_BYTES)
        memory = mmap.mmap(descriptor, arena_bytes(4, SLOT_BYTES))
        memory[:] = b"x" * len(memory)
        assert os.fstat(descriptor).st_blocks * 512 == len(memory)
        discard_pages(descriptor)
        assert os.fstat(descriptor).st_blocks == 0
        assert memory[-1] == 0  # no SIGBUS
        memory.close()
        os.close(descriptor)


class TestMakingOne:
    @pytest.mark.parametrize(
        ("slots", "slot_bytes"), [(0, 4096), (MAX_SLOTS + 1, 4096), (1, 0), (1, -4096), (1, 4097), (-1, 4096)]
    )
    def test_sizes_out_of_bounds_are_refused(self, path, slots, slot_bytes):
        with pytest.raises(BadMessage, match=f"{slots} slots of {slot_bytes} bytes"):
            create_arena(path, slots=slots, slot_bytes=slot_bytes)
        assert not os.path.exists(path)

    def test_one_that_does_not_fit_is_refused_with_the_numbers(self, path, monkeypatch):
        monkeypatch.setattr(arena, "available_bytes", lambda directory: 10_000)
        with pytest.raises(ShmTooSmall) as caught:
            create_arena(path, slots=2, slot_bytes=4096)
        facts = {"path": os.path.dirname(path), "wanted_bytes": 3 * 4096, "free_bytes": 10_000}
        assert facts.items() <= caught.value.report().facts.items()
        assert not os.path.exists(path)

    @pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, ShmTooSmall), (errno.EIO, SystemCallFailed)])
    def test_pages_that_cannot_be_had_leave_no_file(self, path, monkeypatch, number, kind):
        def refuse(*_):
            raise OSError(number, "no")

        monkeypatch.setattr(os, "posix_fallocate", refuse)
        open_before = os.listdir("/proc/self/fd")
        with pytest.raises(kind):
            create_arena(path, slots=1, slot_bytes=4096)
        assert not os.path.exists(path)
        assert os.listdir("/proc/self/fd") == open_before

    @pytest.mark.parametrize("what", ["file", "link"])
    def test_a_name_that_is_taken_is_left_alone(self, path, tmp_path, what):
        other = tmp_path / "other"
        other.write_bytes(b"mine")
        os.link(other, path) if what == "file" else os.symlink(other, path)
        with pytest.raises(SystemCallFailed, match=f"open {path}"):
            create_arena(path, slots=1, slot_bytes=4096)
        assert other.read_bytes() == b"mine"

    def test_it_is_given_to_its_owner(self, path, monkeypatch):
        given = []
        monkeypatch.setattr(os, "fchown", lambda descriptor, uid, gid: given.append((uid, gid)))
        os.close(create_arena(path, slots=1, slot_bytes=4096, owner=(1001, 1002)))
        assert given == [(1001, 1002)]

    def test_room_is_the_lesser_of_the_volume_and_the_memory(self, tmp_path):
        volume = os.statvfs(tmp_path)
        assert 0 < available_bytes(str(tmp_path)) <= volume.f_bavail * volume.f_frsize


class _NoPopulate:
    """A libc of before Linux 5.14."""

    @staticmethod
    def madvise(*_):
        return -1


class TestTheView:
    @pytest.mark.parametrize("threads", [1, 2, 7])
    @pytest.mark.parametrize("libc", ["new", "old"])
    def test_touching_changes_no_byte(self, view, monkeypatch, threads, libc):
        if libc == "old":
            monkeypatch.setattr(arena, "_libc", _NoPopulate)
        content = b"\x07" * len(view.memory)
        view.memory[:] = content
        view.touch(threads=threads)
        assert view.memory[:] == content

    def test_it_lies_on_a_page(self, view):
        assert view.address % ALIGNMENT_BYTES == 0

    def test_the_memory_outlives_the_descriptor(self, descriptor):
        view = ArenaView(os.dup(descriptor), arena=1, slots=3, slot_bytes=SLOT_BYTES)
        view.close()
        view.close()
        view.set_state(0, SlotState.STAGING)
        assert read_slot(descriptor, 0)[0] is SlotState.STAGING
        view.memory.close()


class TestMarks:
    """Who uses an arena is known by a lock that dies with the process."""

    def test_an_arena_is_held_until_the_mark_is_taken_back(self, descriptor):
        assert not is_held(descriptor)
        mark = hold(descriptor)
        assert is_held(descriptor)
        let_go(mark)
        assert not is_held(descriptor)
        let_go(mark)  # a second time is no error

    def test_a_view_marks_its_arena(self, view, descriptor):
        assert is_held(descriptor)
        view.close()
        assert not is_held(descriptor)

    def test_sigkill_takes_the_mark_away(self, descriptor, path):
        code = "import os, sys; from ckptd.staging.arena import hold; hold(os.open(sys.argv[1], os.O_RDWR)); "
        code += "print(flush=True); input()"
        command = [sys.executable, "-c", code, path]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            assert is_held(descriptor)
            process.kill()
            process.wait()
        assert not is_held(descriptor)

    def test_a_forked_child_does_not_keep_the_mark(self, view, descriptor):
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            ours.close()
            theirs.send(b"!")
            theirs.recv(1)  # lives on when the parent has let go
            os._exit(0)
        theirs.close()
        ours.recv(1)
        view.close()
        assert not is_held(descriptor)
        ours.close()
        os.waitpid(pid, 0)


class TestOpeningOneAgain:
    """A successor finds the arenas of the daemon before it."""

    def test_the_same_arena_is_opened(self, path, descriptor):
        again = open_arena(path, slots=SLOTS, slot_bytes=SLOT_BYTES)
        assert os.path.samestat(os.fstat(again), os.fstat(descriptor))
        os.close(again)

    @pytest.mark.parametrize("damage", ["gone", "cut", "another", "overwritten", "a link"])
    def test_what_is_no_such_arena_any_more_is_not(self, path, descriptor, tmp_path, damage):
        slots = SLOTS
        if damage == "gone":
            os.unlink(path)
        elif damage == "cut":
            os.truncate(path, 4096)
        elif damage == "another":
            slots = SLOTS + 1
        elif damage == "overwritten":
            os.pwrite(descriptor, b"garbage!", 0)
        else:
            os.rename(path, tmp_path / "elsewhere")
            os.symlink(tmp_path / "elsewhere", path)
        assert open_arena(path, slots=slots, slot_bytes=SLOT_BYTES) is None
