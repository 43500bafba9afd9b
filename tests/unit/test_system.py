"""System calls whose failure names call and path."""

from __future__ import annotations

import ctypes
import errno
import os

import pytest

from ckptd.checkpoint import system
from ckptd.checkpoint.system import named, preallocate, rename_exchange, rename_new, sync_directory, write_file
from ckptd.protocol.errors import SystemCallFailed


class FakeLibc:
    """Fails with these numbers, one after the other, and then succeeds."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = list(numbers)
        self.calls = 0

    def _call(self, *_) -> int:
        self.calls += 1
        if not self.numbers:
            return 0
        ctypes.set_errno(self.numbers.pop(0))
        return -1

    fallocate = renameat2 = _call


@pytest.fixture
def libc(monkeypatch):
    def fail(*numbers):
        fake = FakeLibc(*numbers)
        monkeypatch.setattr(system, "_libc", fake)
        return fake

    return fail


@pytest.fixture
def pair(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    (one / "file").write_text("one")
    return one, other


def test_a_failure_names_the_call_and_the_path():
    def fail():
        raise OSError(errno.EDQUOT, "quota", "/elsewhere")

    with pytest.raises(SystemCallFailed) as caught:
        named("write", "/a/b", fail)
    assert caught.value.report().facts == {"call": "write", "path": "/a/b", "errno": errno.EDQUOT}
    assert named("write", "/a/b", lambda: 7) == 7


def test_a_failure_without_a_number_is_an_input_output_error():
    def fail():
        raise OSError("odd")

    with pytest.raises(SystemCallFailed, match=f"errno {errno.EIO}"):
        named("write", "/a/b", fail)


class TestPreallocate:
    def test_it_reserves_blocks(self, tmp_path):
        descriptor = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
        preallocate(descriptor, 64 * 1024, "file")
        assert os.fstat(descriptor).st_size == 64 * 1024
        os.close(descriptor)

    @pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
    def test_a_file_system_that_cannot_is_no_error(self, libc, number):
        fake = libc(number)
        preallocate(3, 4096, "file")
        assert fake.calls == 1

    def test_an_interrupted_call_is_made_again(self, libc):
        fake = libc(errno.EINTR, errno.EINTR)
        preallocate(3, 4096, "file")
        assert fake.calls == 3

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EFBIG])
    def test_no_room_is_an_error(self, libc, number):
        libc(number)
        with pytest.raises(SystemCallFailed) as caught:
            preallocate(3, 4096, "/a/file")
        assert (caught.value.call, caught.value.path, caught.value.errno) == ("fallocate", "/a/file", number)


class TestRename:
    def test_a_new_name_is_given(self, pair):
        one, other = pair
        assert rename_new(str(one), str(other))
        assert (other / "file").read_text() == "one"
        assert not one.exists()

    def test_a_name_that_is_taken_is_not_given(self, pair):
        one, other = pair
        other.mkdir()
        with pytest.raises(SystemCallFailed) as caught:
            rename_new(str(one), str(other))
        assert (caught.value.errno, caught.value.path) == (errno.EEXIST, str(other))
        assert (one / "file").exists()

    def test_names_are_exchanged(self, pair):
        one, other = pair
        other.mkdir()
        assert rename_exchange(str(one), str(other))
        assert (other / "file").read_text() == "one"
        assert list(one.iterdir()) == []

    def test_a_name_that_is_not_there_cannot_be_exchanged(self, pair):
        with pytest.raises(SystemCallFailed, match="rename"):
            rename_exchange(*map(str, pair))

    @pytest.mark.parametrize("rename", [rename_new, rename_exchange])
    @pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
    def test_a_file_system_that_cannot_says_so(self, libc, rename, number):
        libc(number)
        assert not rename("/a", "/b")

    def test_names_of_any_bytes_are_taken(self, tmp_path):
        odd = os.fsdecode(b"\xff odd \xe4")
        (tmp_path / "a").mkdir()
        assert rename_new(str(tmp_path / "a"), f"{tmp_path}/{odd}")
        assert os.listdir(tmp_path) == [odd]


class TestWriteFile:
    def test_it_writes_all_and_syncs_the_file_before_it_returns(self, tmp_path, monkeypatch):
        synced = []
        fsync = os.fsync

        def watched(descriptor):
            synced.append(os.fstat(descriptor).st_size)
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", watched)
        write_file(str(tmp_path / "file"), b"content")
        assert (tmp_path / "file").read_bytes() == b"content"
        assert synced == [7]

    def test_short_writes_are_continued(self, tmp_path, monkeypatch):
        write = os.write
        monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:3]))
        write_file(str(tmp_path / "file"), b"ten bytes.")
        assert (tmp_path / "file").read_bytes() == b"ten bytes."

    def test_what_a_try_before_left_is_replaced(self, tmp_path):
        (tmp_path / "file").write_bytes(b"longer than the new one")
        write_file(str(tmp_path / "file"), b"new")
        assert (tmp_path / "file").read_bytes() == b"new"

    def test_a_link_is_not_followed(self, tmp_path):
        (tmp_path / "victim").write_bytes(b"mine")
        (tmp_path / "file").symlink_to(tmp_path / "victim")
        with pytest.raises(SystemCallFailed, match="open"):
            write_file(str(tmp_path / "file"), b"new")
        assert (tmp_path / "victim").read_bytes() == b"mine"

    @pytest.mark.parametrize("call", ["write", "fsync"])
    def test_a_failure_is_told_and_leaves_no_descriptor(self, tmp_path, monkeypatch, call):
        def fail(*_):
            raise OSError(errno.ENOSPC, "full")

        monkeypatch.setattr(os, call, fail)
        before = os.listdir("/proc/self/fd")
        with pytest.raises(SystemCallFailed) as caught:
            write_file(str(tmp_path / "file"), b"new")
        assert (caught.value.call, caught.value.path) == (call, str(tmp_path / "file"))
        assert os.listdir("/proc/self/fd") == before


def test_a_directory_is_synced(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    sync_directory(str(tmp_path))
    assert synced == [str(tmp_path)]


@pytest.mark.parametrize("what", ["missing", "a file"])
def test_what_is_no_directory_cannot_be_synced(tmp_path, what):
    path = tmp_path / "path"
    if what == "a file":
        path.touch()
    with pytest.raises(SystemCallFailed, match=f"open {path}"):
        sync_directory(str(path))
