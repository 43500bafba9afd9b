"""Rows copied out of a mapping."""

from __future__ import annotations

import mmap
import os
import platform

import numpy as np
import pytest

from ckptd.checkpoint.reading import mapped
from ckptd.checkpoint.reading.blocks import LARGE_BLOCK_BYTES
from ckptd.checkpoint.reading.mapped import MappedFile
from ckptd.checkpoint.reading.pagecache import PageCacheProbe

DATA = np.random.default_rng(0).bytes(3 * 4096 + 77)


@pytest.fixture
def file(tmp_path):
    (tmp_path / "f").write_bytes(DATA)
    descriptor = os.open(tmp_path / "f", os.O_RDONLY)
    found = MappedFile(descriptor, len(DATA))
    yield found
    found.close()
    os.close(descriptor)


def rows_of(file, begins, row_bytes):
    target = bytearray(len(begins) * row_bytes)
    assert file.copy_rows(np.array(begins, np.int64), row_bytes, memoryview(target))
    return bytes(target)


@pytest.mark.parametrize(
    ("begins", "row_bytes"),
    [
        ([0], 5),
        ([7, 4103, 8199], 100),
        ([0, 10, 20, 5000, 5010, 12000], 10),
        ([1, 3, 6, 10, 15, 21], 1),
        ([0, 4, 8], 4),
        ([len(DATA) - 9], 9),
    ],
    ids=["one", "equally far", "in groups", "ever farther", "adjoining", "at the end"],
)
def test_rows_come_one_behind_the_other(file, begins, row_bytes):
    assert rows_of(file, begins, row_bytes) == b"".join(DATA[at : at + row_bytes] for at in begins)


class Refusing:
    """A kernel that cannot populate, or a disk that fails."""

    def madvise(self, *_):
        return -1


def test_what_cannot_be_populated_is_not_touched(file, monkeypatch):
    monkeypatch.setattr(mapped, "_libc", Refusing())
    target = bytearray(4)
    assert not file.copy_rows(np.array([0], np.int64), 4, memoryview(target))
    assert target == bytes(4)


@pytest.mark.parametrize("mapped_before", [True, False])
def test_a_file_that_was_cut_meanwhile_is_not_the_end_of_the_process(file, tmp_path, mapped_before):
    if mapped_before:
        rows_of(file, [0], 4)
    os.truncate(tmp_path / "f", 4096)
    assert not file.copy_rows(np.array([2 * 4096], np.int64), 4, memoryview(bytearray(4)))


class TestLargeBlocks:
    def test_a_look_brings_the_block_and_nothing_behind_it(self, tmp_path):
        descriptor = os.open(tmp_path / "large", os.O_RDWR | os.O_CREAT)
        os.write(descriptor, bytes(3 * LARGE_BLOCK_BYTES))
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        probe, file = PageCacheProbe(descriptor, 3 * LARGE_BLOCK_BYTES), MappedFile(descriptor, 3 * LARGE_BLOCK_BYTES)
        assert file.brings_large_blocks()
        rows_of(file, [LARGE_BLOCK_BYTES + 12345], 10)
        cached = [probe.is_all_or_nothing(block * LARGE_BLOCK_BYTES, LARGE_BLOCK_BYTES) for block in range(3)]
        file.close()
        os.close(descriptor)
        assert cached == [False, True, False]

    @pytest.mark.parametrize("release", ["5.17.9", "4.19.0-rc1", "5.4", "none"])
    def test_a_kernel_that_is_too_old_does_not(self, file, monkeypatch, release):
        monkeypatch.setattr(platform, "release", lambda: release)
        assert not file.brings_large_blocks()
        rows_of(file, [7], 10)

    @pytest.mark.parametrize("release", ["5.18.0", "6.1.0-generic", "10.0"])
    def test_one_that_is_not_too_old_does(self, file, monkeypatch, release):
        monkeypatch.setattr(platform, "release", lambda: release)
        assert file.brings_large_blocks()

    def test_pages_of_another_size_do_not(self, file, monkeypatch):
        monkeypatch.setattr(mmap, "PAGESIZE", 65536)
        assert not file.brings_large_blocks()

    def test_a_kernel_that_was_built_without_them_does_not(self, file, monkeypatch):
        monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 12345)  # unknown advice, as there
        assert not file.brings_large_blocks()
        rows_of(file, [7], 10)

    def test_a_file_that_cannot_be_mapped_does_not(self, file, tmp_path):
        os.truncate(tmp_path / "f", 0)
        assert not file.brings_large_blocks()
