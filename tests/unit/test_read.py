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

from ckptd.checkpoint.reading import files as read_files
from ckptd.checkpoint.reading import read as read_module
from ckptd.checkpoint.reading import requests as read_requests
from ckptd.checkpoint.reading.mapped import MappedFile
from ckptd.checkpoint.reading.pagecache import PageCacheProbe
from ckptd.checkpoint.reading.read import Read, ReadCount, Rows, read_all
from ckptd.protocol.errors import MissingFile, SystemCallFailed, TruncatedFile, WrongBits

PAGE = 4096
CHUNK = 4 * PAGE
GAP = read_requests.MERGE_GAP_BYTES
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


def pretend(monkeypatch, *, cached: bool) -> None:
    """Let every file be in the page cache, or no file."""
    monkeypatch.setattr(PageCacheProbe, "is_cached", lambda self, offset, nbytes: cached)
    monkeypatch.setattr(PageCacheProbe, "is_all_or_nothing", lambda self, offset, nbytes: None)


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
    pretend(monkeypatch, cached=cached)
    monkeypatch.setattr(read_requests, "CHUNK_BYTES", CHUNK)
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
        count = read_all(wanted.reads, threads=threads)
        assert count.wanted_bytes == sum(nbytes for _, nbytes in ranges)
        assert count.read_bytes >= len({byte for at, nbytes in ranges for byte in range(at, at + nbytes)})
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


def test_a_pipe_in_a_files_place_keeps_nobody_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TruncatedFile):
        read_files.DiskFile(str(tmp_path / "pipe"), 0, 10)


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

    pretend(monkeypatch, cached=False)
    monkeypatch.setattr(os, "preadv", refuse)
    wanted = Wanted(file)
    wanted.add(0, 2 * PAGE)
    wanted.add(100 * 1024 + 7, 77)
    read_all(wanted.reads)
    wanted.check()


def cut(buffers, nbytes: int):
    """Return the first bytes of a list of buffers."""
    kept = []
    for buffer in buffers:
        kept.append(buffer[: nbytes - sum(map(len, kept))])
    return [buffer for buffer in kept if len(buffer)]


@pytest.mark.parametrize("step", [1000, PAGE])
def test_short_reads_are_continued(file, monkeypatch, way, step):
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda descriptor, buffers, at: real(descriptor, cut(buffers, step), at))
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


def test_what_was_read_is_counted_with_gaps_that_cost_little(file, monkeypatch):
    pretend(monkeypatch, cached=True)
    wanted = Wanted(file)
    wanted.add(0, 50_000)
    wanted.add(50_100, 30_000)
    wanted.add(150 * 1024, 10)
    assert read_all(wanted.reads) == ReadCount(80_010, 80_110)
    wanted.check()


def test_blocks_that_were_read_past_the_cache_are_counted(file, monkeypatch):
    pretend(monkeypatch, cached=False)
    wanted = Wanted(file)
    wanted.add(PAGE + 1, 32 * PAGE - 2)
    assert read_all(wanted.reads) == ReadCount(32 * PAGE - 2, 32 * PAGE)
    wanted.check()


def test_a_short_range_is_not_rounded_to_blocks(file, monkeypatch):
    pretend(monkeypatch, cached=False)
    wanted = Wanted(file)
    wanted.add(PAGE + 1, PAGE)
    assert read_all(wanted.reads) == ReadCount(PAGE, PAGE)
    wanted.check()


def test_cached_targets_are_copied_to_without_a_bounce(file, monkeypatch):
    pretend(monkeypatch, cached=True)
    monkeypatch.setattr(read_files.DiskFile, "view", _no_bounce)
    wanted = Wanted(file)
    wanted.add(PAGE, 4 * PAGE, shift=3)
    wanted.add(5 * PAGE + 7, 20 * PAGE, shift=9)
    read_all(wanted.reads)
    wanted.check()


def test_the_disk_is_read_into_aligned_buffers_of_whole_huge_pages():
    buffer = read_module.huge_buffer(8 << 20)
    assert len(buffer) == 8 << 20
    assert ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % (2 << 20) == 0


def _no_bounce(*_, **__):
    raise AssertionError("read through a bounce buffer")


class TestRows:
    """Parts of a range that lie far apart, packed one behind the other."""

    STARTS = np.arange(0, 40 * PAGE, PAGE)

    def read_rows(self, file, starts, row_bytes, **options):
        starts = np.asarray(starts, np.int64)
        target = Target(len(starts) * row_bytes, shift=5)
        handed = []
        rows = Rows(starts, row_bytes)
        read = Read(file, 100, target.nbytes, target.address, "item", None, lambda: handed.append(1), None, rows)
        count = read_all([read], **options)
        assert count == ReadCount(target.nbytes, target.nbytes)
        assert target.content() == b"".join(DATA[100 + at : 100 + at + row_bytes] for at in starts.tolist())
        assert handed == [1]

    @pytest.mark.parametrize("threads", [1, 3])
    def test_only_they_are_read(self, file, way, threads, monkeypatch):
        monkeypatch.setattr(read_requests, "_ROWS_PER_REQUEST", 7)
        self.read_rows(file, self.STARTS, 777, threads=threads)

    def test_one_row(self, file, way):
        self.read_rows(file, [0], 10)

    def test_rows_longer_than_a_chunk(self, file, way):
        self.read_rows(file, [0, 6 * PAGE, 12 * PAGE], 5 * PAGE)

    def test_short_reads_of_rows_are_continued(self, file, monkeypatch, way):
        real = os.preadv
        monkeypatch.setattr(MappedFile, "copy_rows", lambda *_: False)
        monkeypatch.setattr(os, "preadv", lambda descriptor, buffers, at: real(descriptor, cut(buffers, 100), at))
        self.read_rows(file, self.STARTS, 777)

    def test_a_file_that_ends_within_a_row_is_told(self, file):
        starts = np.array([0, len(DATA) - 500], np.int64)
        target = Target(2000)
        with pytest.raises(TruncatedFile):
            read_all([Read(file, 0, 2000, target.address, "item", rows=Rows(starts, 1000))])

    def test_a_file_that_is_cut_meanwhile_is_told(self, file, monkeypatch):
        monkeypatch.setattr(MappedFile, "copy_rows", lambda *_: False)
        monkeypatch.setattr(os, "preadv", lambda descriptor, buffers, at: 0)
        target = Target(2000)
        with pytest.raises(TruncatedFile):
            read_all([Read(file, 0, 2000, target.address, "item", rows=Rows(np.array([0, 5000], np.int64), 1000))])


class FromMemory:
    """A source that has every file at hand, as a cache on the node would."""

    name = "memory"

    def __init__(self, files: dict[str, bytes]) -> None:
        self._files, self.opened = files, []

    def open(self, path, ranges):
        self.opened.append((path, ranges))
        return FileInMemory(self._files[path])


class FileInMemory:
    def __init__(self, content: bytes) -> None:
        self._content, self.read_bytes = content, 0

    def fill(self, begin, targets):
        return False

    def view(self, begin, end, bounce):
        self.read_bytes += end - begin
        return memoryview(self._content)[begin:end]

    def fill_rows(self, begins, row_bytes, target, *, blocks):
        target[:] = b"".join(self._content[at : at + row_bytes] for at in begins.tolist())
        self.read_bytes += len(target)

    def close(self):
        self._content = b""


class TestAnotherSource:
    def test_bytes_come_from_it_and_are_verified(self, tmp_path):
        gone = str(tmp_path / "gone")
        wanted = Wanted(gone)
        wanted.add(100, 50_000, expected=xxh3_64_intdigest(DATA[100:50_100]))
        wanted.add(60_000, 9)
        source = FromMemory({gone: DATA})
        assert read_all(wanted.reads, source=source) == ReadCount(50_009, 50_009)
        assert source.opened == [(gone, [(100, 50_100), (60_000, 60_009)])]
        wanted.check()

    def test_rows_come_from_it(self):
        target = Target(200)
        read = Read("file", 0, 200, target.address, "item", rows=Rows(np.array([0, 5000], np.int64), 100))
        assert read_all([read], source=FromMemory({"file": DATA})) == ReadCount(200, 200)
        assert target.content() == DATA[:100] + DATA[5000:5100]

    def test_its_wrong_bits_are_told_as_well(self, tmp_path):
        gone = str(tmp_path / "gone")
        wanted = Wanted(gone)
        wanted.add(100, 50, expected=12345)
        with pytest.raises(WrongBits):
            read_all(wanted.reads, source=FromMemory({gone: DATA}))
        assert wanted.handed == []


class TestThePageCache:
    @pytest.fixture(params=["cachestat", "mincore"])
    def kernel(self, request, monkeypatch):
        if request.param == "mincore":
            monkeypatch.setattr("ckptd.checkpoint.reading.pagecache._CACHESTAT", None)
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

    def test_a_whole_file_may_be_told_at_once(self, file):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        probe = PageCacheProbe(descriptor, len(DATA))
        told = [probe.is_all_or_nothing(0, len(DATA))]
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        told.append(probe.is_all_or_nothing(0, len(DATA)))
        os.pread(descriptor, PAGE, 8 * PAGE)
        told.append(probe.is_all_or_nothing(0, len(DATA)))
        told.append(probe.is_all_or_nothing(8 * PAGE, PAGE))
        assert told == [True, False, None, True]
        os.close(descriptor)

    def test_or_not_where_only_parts_can_be_asked_for(self, file, monkeypatch):
        monkeypatch.setattr("ckptd.checkpoint.reading.pagecache._CACHESTAT", None)
        descriptor = os.open(file, os.O_RDONLY)
        probe = PageCacheProbe(descriptor, len(DATA))
        assert probe.is_all_or_nothing(0, len(DATA)) is None
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
        monkeypatch.setattr("ckptd.checkpoint.reading.pagecache._CACHESTAT", None)
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
