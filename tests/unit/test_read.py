"""Ranges of files land where they belong, verified, or nothing is handed on."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

import numpy as np
import pytest
from support.images import random_bytes
from xxhash import xxh3_64_intdigest

from ckptd.checkpoint import read as read_module
from ckptd.checkpoint.pagecache import PageCacheProbe
from ckptd.checkpoint.read import Read, read_all
from ckptd.protocol.errors import MissingFile, SystemCallFailed, TruncatedFile, WrongBits

PAGE = 4096
CHUNK = 4 * PAGE
GAP = read_module._MERGE_GAP_BYTES
DATA = random_bytes(200 * 1024)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "__0_0.distcp"
    path.write_bytes(DATA)
    return str(path)


class Target:
    """Memory that a range is read into, with a guard before and behind it."""

    def __init__(self, nbytes: int, *, shift: int = 0) -> None:
        self._memory = mmap.mmap(-1, nbytes + 3 * PAGE)
        self._memory[:] = b"\xee" * len(self._memory)
        self._begin, self.nbytes = PAGE + shift, nbytes
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory)) + self._begin

    def content(self) -> bytes:
        before, behind = self._memory[: self._begin], self._memory[self._begin + self.nbytes :]
        assert set(before) <= {0xEE}
        assert set(behind) <= {0xEE}
        return self._memory[self._begin : self._begin + self.nbytes]


class Wanted:
    """Reads of one file, their targets, and the order in which they were handed on."""

    def __init__(self, file: str) -> None:
        self.file, self.reads, self.targets, self.handed = file, [], [], []

    def add(self, offset: int, nbytes: int, *, shift: int = 0, expected: int | None = None, file: str = "") -> None:
        target, number = Target(nbytes, shift=shift), len(self.reads)
        name = f"item{number}"
        done = lambda: self.handed.append(number)  # noqa: E731
        self.reads.append(Read(file or self.file, offset, nbytes, target.address, name, expected, done))
        self.targets.append(target)

    def check(self) -> None:
        for read, target in zip(self.reads, self.targets, strict=True):
            assert target.content() == DATA[read.offset : read.offset + read.nbytes]
        assert sorted(self.handed) == list(range(len(self.reads)))


@pytest.fixture(params=["cached", "past the cache", "no O_DIRECT"])
def way(request, monkeypatch):
    """The three ways that bytes can come."""
    if request.param == "no O_DIRECT":
        real = os.open

        def refuse(path, flags, *mode):
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "no O_DIRECT here")
            return real(path, flags, *mode)

        monkeypatch.setattr(os, "open", refuse)
    cached = request.param == "cached"
    monkeypatch.setattr(PageCacheProbe, "is_cached", lambda self, offset, nbytes: cached)
    monkeypatch.setattr(read_module, "_CHUNK_BYTES", CHUNK)
    return request.param


RANGES = {
    "one": [(0, 100)],
    "aligned": [(PAGE, 2 * PAGE)],
    "a whole chunk": [(CHUNK, CHUNK)],
    "over chunks": [(100, 3 * CHUNK)],
    "to the end": [(len(DATA) - 5, 5)],
    "all": [(0, len(DATA))],
    "near neighbours": [(10, 20), (50, 5), (1000, 1)],
    "touching": [(0, PAGE), (PAGE, PAGE)],
    "over a small gap": [(0, 10), (9 + GAP, 10)],
    "over a large gap": [(0, 10), (11 + GAP, 10)],
    "overlapping": [(0, 3000), (1000, 500), (2999, 5000)],
    "overlapping one over chunks": [(0, 3 * CHUNK), (100, 50), (200, CHUNK)],
    "the same twice": [(77, 1000), (77, 1000)],
    "from behind": [(9000, 9), (5000, 5), (1000, 1)],
    "nothing": [(50, 0)],
    "no ranges": [],
}


class TestEveryWay:
    @pytest.mark.parametrize("ranges", RANGES.values(), ids=RANGES)
    @pytest.mark.parametrize("threads", [1, 3])
    def test_ranges_are_read(self, file, way, ranges, threads):
        wanted = Wanted(file)
        for number, (offset, nbytes) in enumerate(ranges):
            wanted.add(offset, nbytes, shift=number * 24)
        assert read_all(wanted.reads, threads=threads) >= sum({nbytes for _, nbytes in ranges}) // 2
        wanted.check()

    def test_several_files_are_read_at_once(self, file, way, tmp_path):
        other = tmp_path / "__1_0.distcp"
        other.write_bytes(DATA)
        wanted = Wanted(file)
        for number in range(20):
            wanted.add(number * 5000, 3000, file=str(other) if number % 2 else file)
        read_all(wanted.reads)
        wanted.check()

    def test_a_good_hash_hands_on(self, file, way):
        wanted = Wanted(file)
        wanted.add(5, 3 * CHUNK, expected=xxh3_64_intdigest(DATA[5 : 5 + 3 * CHUNK]))
        wanted.add(5, 0, expected=xxh3_64_intdigest(b""))
        read_all(wanted.reads)
        wanted.check()

    @pytest.mark.parametrize("nbytes", [10, 2 * CHUNK, 0])
    def test_a_wrong_hash_is_told_and_nothing_is_handed_on(self, file, way, nbytes):
        wanted = Wanted(file)
        wanted.add(4100, nbytes, expected=12345)
        with pytest.raises(WrongBits) as caught:
            read_all(wanted.reads)
        assert caught.value.report().facts == {"path": file, "item": "item0", "offset": 4100}
        assert wanted.handed == []

    def test_a_file_that_is_cut_while_it_is_read_is_told(self, file, way):
        wanted = Wanted(file)
        wanted.add(0, 10)
        wanted.add(100 * 1024, 5000)
        wanted.reads[0].then = lambda: os.truncate(file, 102 * 1024)
        with pytest.raises(TruncatedFile) as caught:
            read_all(wanted.reads, threads=1)
        assert caught.value.path == file
        assert caught.value.found_bytes == 102 * 1024
        assert caught.value.wanted_bytes == 100 * 1024 + 5000
        assert wanted.handed == []


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(MissingFile, match=str(tmp_path / "gone")):
        read_all([Read(str(tmp_path / "gone"), 0, 1, Target(1).address, "item")])


def test_a_file_that_may_not_be_opened_is_told(file, monkeypatch):
    def refuse(path, *_):
        raise PermissionError(errno.EACCES, "no")

    wanted = Wanted(file)
    wanted.add(0, 10)
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(SystemCallFailed, match=f"open {file}"):
        read_all(wanted.reads)


@pytest.mark.parametrize("offset", [len(DATA) - 99, len(DATA), len(DATA) + 10_000])
def test_a_file_that_is_too_short_is_told_before_anything_is_read(file, offset):
    wanted = Wanted(file)
    wanted.add(0, 10)
    wanted.add(offset, 100)
    with pytest.raises(TruncatedFile) as caught:
        read_all(wanted.reads)
    assert (caught.value.wanted_bytes, caught.value.found_bytes) == (offset + 100, len(DATA))
    assert wanted.handed == []


def test_a_read_that_fails_is_told(file, monkeypatch, way):
    def fail(*_):
        raise OSError(errno.EIO, "bad block")

    wanted = Wanted(file)
    wanted.add(0, 10)
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(SystemCallFailed) as caught:
        read_all(wanted.reads)
    assert caught.value.report().facts == {"call": "pread", "path": file, "errno": errno.EIO}


def test_a_file_system_that_refuses_direct_reads_is_read_through_the_cache(file, monkeypatch):
    real = os.preadv

    def refuse(descriptor, buffers, offset):
        with open(f"/proc/self/fdinfo/{descriptor}") as info:
            flags = next(int(line.split()[1], 8) for line in info if line.startswith("flags:"))
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "unaligned")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(PageCacheProbe, "is_cached", lambda self, offset, nbytes: False)
    monkeypatch.setattr(os, "preadv", refuse)
    wanted = Wanted(file)
    wanted.add(0, 2 * PAGE)
    wanted.add(100 * 1024 + 7, 77)
    read_all(wanted.reads)
    wanted.check()


@pytest.mark.parametrize("step", [1000, PAGE])
def test_short_reads_are_continued(file, monkeypatch, way, step):
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda descriptor, buffers, at: real(descriptor, [buffers[0][:step]], at))
    wanted = Wanted(file)
    wanted.add(PAGE, 2 * PAGE)
    wanted.add(100 * 1024 + 7, 3000)
    read_all(wanted.reads)
    wanted.check()


def test_no_descriptor_is_left(file, tmp_path):
    before = os.listdir("/proc/self/fd")
    wanted = Wanted(file)
    wanted.add(0, 10)
    read_all(wanted.reads)
    wanted.add(0, 10, file=str(tmp_path / "gone"))
    with pytest.raises(MissingFile):
        read_all(wanted.reads)
    assert os.listdir("/proc/self/fd") == before


def test_gaps_that_were_read_are_counted(file):
    wanted = Wanted(file)
    wanted.add(0, 10)
    wanted.add(100, 10)
    wanted.add(150 * 1024, 10)
    assert read_all(wanted.reads) == 110 + 10


def test_a_cached_target_is_copied_to_without_a_bounce(file, monkeypatch):
    monkeypatch.setattr(PageCacheProbe, "is_cached", lambda self, offset, nbytes: True)
    monkeypatch.setattr(read_module, "_into", _no_bounce)
    wanted = Wanted(file)
    wanted.add(PAGE, 4 * PAGE)
    read_all(wanted.reads)
    wanted.check()


def test_the_disk_is_read_into_aligned_buffers_of_whole_huge_pages():
    buffer = read_module._huge_buffer(8 << 20)
    assert len(buffer) == 8 << 20
    assert ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % (2 << 20) == 0


def _no_bounce(*_, **__):
    raise AssertionError("read through a bounce buffer")


class TestThePageCache:
    @pytest.fixture(params=["cachestat", "mincore"])
    def kernel(self, request, monkeypatch):
        if request.param == "mincore":
            monkeypatch.setattr("ckptd.checkpoint.pagecache._CACHESTAT", None)
        return request.param

    def test_what_was_just_written_is_cached_and_what_was_dropped_is_not(self, file, kernel):
        descriptor = os.open(file, os.O_RDONLY)
        probe = PageCacheProbe(descriptor, len(DATA))
        assert probe.is_cached(0, len(DATA))
        assert probe.is_cached(5000, 1)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        assert not probe.is_cached(0, len(DATA))
        probe.close()
        probe.close()
        os.close(descriptor)

    def test_an_empty_file_is_not_cached(self, tmp_path, kernel):
        (tmp_path / "empty").touch()
        descriptor = os.open(tmp_path / "empty", os.O_RDONLY)
        probe = PageCacheProbe(descriptor, 0)
        assert not probe.is_cached(0, 1)
        probe.close()
        os.close(descriptor)

    def test_a_file_of_somebody_else_is_not_believed_to_be_cached(self, file, monkeypatch):
        monkeypatch.setattr("ckptd.checkpoint.pagecache._CACHESTAT", None)
        monkeypatch.setattr(os, "geteuid", lambda: os.stat(file).st_uid + 1)
        descriptor = os.open(file, os.O_RDONLY)
        probe = PageCacheProbe(descriptor, len(DATA))
        assert not probe.is_cached(0, 1)
        probe.close()
        os.close(descriptor)


def test_numpy_arrays_are_filled_in_place(file):
    array = np.zeros(1000, np.uint8)
    read_all([Read(file, 7, 1000, array.ctypes.data, "item")])
    assert array.tobytes() == DATA[7:1007]
