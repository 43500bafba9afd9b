"""What rows of a file make the disk do: what is asked for ahead, and what is left to the large blocks."""

from __future__ import annotations

import os

import numpy as np
import pytest

from ckptd.checkpoint.reading.files import DiskFile
from ckptd.checkpoint.reading.mapped import MappedFile
from ckptd.checkpoint.reading.pagecache import PageCacheProbe
from ckptd.protocol.errors import SystemCallFailed

DATA = np.random.default_rng(1).bytes(64 * 4096)
CLOSE = np.arange(500, 60 * 4096, 4096)
FAR = np.arange(500, 60 * 4096, 12 * 1024)
END = 500 + 59 * 4096 + 100


class Rows:
    """Rows of a file that is not cached, and what was asked for ahead."""

    def __init__(self, path, monkeypatch, *, large: bool, cached: bool = False) -> None:
        monkeypatch.setattr(PageCacheProbe, "is_all_or_nothing", lambda self, offset, nbytes: cached)
        monkeypatch.setattr(MappedFile, "brings_large_blocks", lambda self: large)
        path.write_bytes(DATA)
        self.file, self.asked = DiskFile(str(path), 0, len(DATA)), []
        monkeypatch.setattr(os, "posix_fadvise", lambda _, begin, nbytes, advice: self.note(begin, nbytes, advice))

    def note(self, begin, nbytes, advice):
        assert advice == os.POSIX_FADV_WILLNEED
        assert nbytes <= 128 * 1024  # the kernel would cut it to that
        first = self.asked.pop()[0] if self.asked and self.asked[-1][1] == begin else begin
        self.asked.append((first, begin + nbytes))

    def fill(self, begins, row_bytes, *, blocks):
        target = bytearray(len(begins) * row_bytes)
        self.file.fill_rows(begins, row_bytes, memoryview(target), blocks=blocks)
        assert bytes(target) == b"".join(DATA[at : at + row_bytes] for at in begins.tolist())
        assert self.file.read_bytes == len(target)


@pytest.fixture
def rows(request, tmp_path, monkeypatch):
    made = Rows(tmp_path / "f", monkeypatch, **request.param)
    yield made
    made.file.close()


large = pytest.mark.parametrize("rows", [{"large": True}], indirect=True, ids=["large blocks"])
small = pytest.mark.parametrize("rows", [{"large": False}], indirect=True, ids=["no large blocks"])


@large
@pytest.mark.parametrize(
    ("blocks", "asked"),
    [
        ((0, 0), [(500, END)]),
        ((8192, 16384), [(500, 8192), (16384, END)]),
        ((0, 16384), [(16384, END)]),
        ((8192, 64 * 4096), [(500, 8192)]),
        ((0, 64 * 4096), []),
        ((64 * 4096, 64 * 4096), [(500, END)]),
    ],
    ids=["none", "within", "from before", "to behind", "all", "none, behind"],
)
def test_only_what_is_in_no_large_block_is_asked_for(rows, blocks, asked):
    rows.fill(CLOSE, 100, blocks=blocks)
    assert rows.asked == asked


@small
def test_all_is_asked_for_where_there_are_no_large_blocks(rows):
    rows.fill(CLOSE, 100, blocks=(8192, 16384))
    assert rows.asked == [(500, END)]


@large
def test_rows_far_apart_are_asked_for_one_by_one(rows):
    rows.fill(FAR, 100, blocks=(8192, 16384))
    assert rows.asked == [(at, at + 100) for at in FAR.tolist()]


@large
def test_all_is_asked_for_if_rows_are_too_long_to_be_copied_from_a_mapping(rows):
    begins = np.array([500, 500 + 17 * 4096], np.int64)
    rows.fill(begins, 16 * 4096, blocks=(8192, 16384))
    assert rows.asked == [(500, 500 + 33 * 4096)]


@pytest.mark.parametrize("rows", [{"large": True, "cached": True}], indirect=True, ids=["cached"])
def test_what_is_cached_is_not_asked_for(rows):
    rows.fill(FAR, 100, blocks=(0, 0))
    assert rows.asked == []


@large
def test_a_row_that_cannot_be_read_is_told(rows, monkeypatch):
    def fail(*_):
        raise OSError(5, "the disk fails")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(SystemCallFailed):
        rows.fill(FAR, 100, blocks=(0, 0))
