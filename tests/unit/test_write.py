"""An image becomes a durable file, byte by byte, or an error."""

from __future__ import annotations

import errno
import os
from collections import namedtuple

import numpy as np
import pytest
from support.images import aligned, random_bytes, takes_direct
from xxhash import xxh3_64_intdigest

from ckptd.checkpoint.image.frame import frame_hash, frame_ranges
from ckptd.checkpoint.image.write import Pace, Payloads, Writing, write_image
from ckptd.protocol.errors import DiskFull, SystemCallFailed

PAGE = 4096
DATA = random_bytes(10 * PAGE)
# Some small, one over several chunks, one empty, one to the very end.
ITEMS = [(64, 100), (192, 0), (256, 2000), (PAGE, 5 * PAGE), (7 * PAGE - 5, 10), (8 * PAGE, 2 * PAGE)]


def payloads(items=ITEMS, unindexed=()):
    offsets, lengths = (np.array(column, np.int64) for column in zip(*items, strict=True))
    indexed = np.array([row not in unindexed for row in range(len(items))])
    return Payloads(offsets, lengths, indexed)


NONE = Payloads(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.bool_))


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "__0_0.distcp")


def write(path, data=DATA, items=None, *, threads=2, chunk_bytes=2 * PAGE, on_progress=lambda done: None):
    items = payloads() if items is None else items
    return write_image(path, aligned(data), items, pace=Pace(threads, chunk_bytes), on_progress=on_progress)


def content(path) -> bytes:
    with open(path, "rb") as file:
        return file.read()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("chunk_bytes", [PAGE, 3 * PAGE, 1 << 20])
def test_the_file_holds_the_image_and_every_item_its_hash(path, tmp_path, threads, chunk_bytes):
    written = write(path, threads=threads, chunk_bytes=chunk_bytes)
    assert content(path) == DATA
    assert written.bytes_written == len(DATA)
    assert written.hashes.tolist() == [xxh3_64_intdigest(DATA[at : at + n]) for at, n in ITEMS]
    assert written.direct == takes_direct(tmp_path)
    assert min(written.write_s, written.fsync_s) >= 0


def test_the_frame_has_a_hash_of_all_that_is_no_indexed_payload(path):
    frame = b"".join(DATA[begin:end] for begin, end in [(0, 64), (164, 256), (2256, PAGE)])
    frame += DATA[6 * PAGE : 7 * PAGE - 5] + DATA[7 * PAGE + 5 : 8 * PAGE]
    assert write(path).frame_hash == xxh3_64_intdigest(frame)
    assert write(path, items=payloads(unindexed=range(len(ITEMS)))).frame_hash == xxh3_64_intdigest(DATA)


def test_the_frame_read_from_the_file_is_the_same(path):
    items, found = payloads(unindexed={2}), b""
    expected = write(path, items=items).frame_hash
    found = content(path)
    ranges = frame_ranges(items.offsets[items.indexed], items.lengths[items.indexed], len(found))
    assert frame_hash(ranges, lambda begin, end: found[begin:end]) == expected


def test_an_image_of_nothing_is_an_empty_file(path):
    written = write(path, b"", NONE)
    assert (written.bytes_written, content(path)) == (0, b"")


def test_what_a_try_before_left_is_overwritten(path):
    with open(path, "wb") as file:
        file.write(b"x" * 20 * PAGE)
    write(path)
    assert content(path) == DATA


def test_progress_ends_with_the_whole(path):
    told = []
    write(path, on_progress=told.append)
    assert sorted(told) == [2 * PAGE * n for n in range(1, 6)]


def test_a_link_is_not_followed(path, tmp_path):
    (tmp_path / "victim").write_bytes(b"mine")
    os.symlink(tmp_path / "victim", path)
    with pytest.raises(SystemCallFailed, match=f"open {path}"):
        write(path)
    assert (tmp_path / "victim").read_bytes() == b"mine"


class TestBuffered:
    def test_where_the_file_system_refuses_to_open(self, path, monkeypatch):
        real = os.open

        def refuse(path, flags, *mode):
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "no O_DIRECT here")
            return real(path, flags, *mode)

        monkeypatch.setattr(os, "open", refuse)
        written = write(path)
        assert not written.direct
        assert content(path) == DATA

    @pytest.mark.parametrize("threads", [1, 3])
    def test_where_it_opens_but_refuses_to_write(self, path, monkeypatch, threads):
        real = os.pwrite
        flags = {}

        def refuse(descriptor, data, at):
            direct = os.O_DIRECT & int(_flags_of(descriptor), 8)
            flags[at] = direct
            if direct:
                raise OSError(errno.EINVAL, "unaligned")
            return real(descriptor, data, at)

        monkeypatch.setattr(os, "pwrite", refuse)
        written = write(path, threads=threads)
        assert not written.direct
        assert content(path) == DATA
        assert not any(flags.values())
        assert written.hashes.tolist() == [xxh3_64_intdigest(DATA[at : at + n]) for at, n in ITEMS]

    def test_refused_there_too_it_is_an_error(self, path, monkeypatch):
        def refuse(*_):
            raise OSError(errno.EINVAL, "never")

        monkeypatch.setattr(os, "pwrite", refuse)
        with pytest.raises(SystemCallFailed, match="pwrite"):
            write(path)


def _flags_of(descriptor: int) -> str:
    with open(f"/proc/self/fdinfo/{descriptor}") as info:
        return next(line.split()[1] for line in info if line.startswith("flags:"))


@pytest.mark.parametrize("step", [PAGE, 1000])
def test_short_writes_are_continued(path, monkeypatch, step):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, at: real(descriptor, data[:step], at))
    write(path, chunk_bytes=4 * PAGE)
    assert content(path) == DATA


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_failure_names_call_path_and_number(path, monkeypatch, call, number):
    def fail(*_):
        raise OSError(number, "no")

    monkeypatch.setattr(os, call, fail)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(SystemCallFailed) as caught:
        write(path)
    assert caught.value.report().facts == {"call": call, "path": path, "errno": number}
    assert os.listdir("/proc/self/fd") == before


def test_a_failure_in_the_last_of_several_threads_is_raised(path, monkeypatch):
    real = os.pwrite

    def fail_at_the_end(descriptor, data, at):
        if at == 9 * PAGE:
            raise OSError(errno.EIO, "bad block")
        return real(descriptor, data, at)

    monkeypatch.setattr(os, "pwrite", fail_at_the_end)
    with pytest.raises(SystemCallFailed, match="pwrite"):
        write(path, threads=3, chunk_bytes=PAGE)


def test_after_a_failure_no_thread_begins_another_chunk(path, monkeypatch):
    tried = []

    def fail(descriptor, data, at):
        tried.append(at)
        raise OSError(errno.EIO, "bad block")

    monkeypatch.setattr(os, "pwrite", fail)
    writing = Writing(path, -1, aligned(DATA), payloads(), PAGE, lambda done: None)
    with pytest.raises(SystemCallFailed):
        writing.run()
    writing.run()  # as the other threads do, whose chunk was good
    assert tried == [0]


def test_too_little_room_is_told_before_anything_is_written(path, monkeypatch, tmp_path):
    volume = namedtuple("Volume", "f_blocks f_bavail f_frsize")
    monkeypatch.setattr(os, "statvfs", lambda directory: volume(100, 9, PAGE))
    with pytest.raises(DiskFull) as caught:
        write(path)
    facts = {"path": str(tmp_path), "wanted_bytes": 10 * PAGE, "free_bytes": 9 * PAGE}
    assert facts.items() <= caught.value.report().facts.items()
    assert not os.path.exists(path)


def test_a_volume_that_does_not_tell_its_room_is_not_full(path, monkeypatch):
    volume = namedtuple("Volume", "f_blocks f_bavail f_frsize")
    monkeypatch.setattr(os, "statvfs", lambda directory: volume(0, 0, PAGE))
    write(path)
    assert content(path) == DATA


def test_a_directory_that_is_not_there_is_told(tmp_path):
    with pytest.raises(SystemCallFailed, match=f"statvfs {tmp_path}/none"):
        write(str(tmp_path / "none" / "file"))
