"""Images in shared memory are read like files, within their bounds, and whatever is wrong with them is an error."""

from __future__ import annotations

import os

import numpy as np
import pytest
from support.images import random_bytes

from ckptd.checkpoint.reading import images as read_images
from ckptd.checkpoint.reading.images import ImageFile
from ckptd.checkpoint.reading.mapped import MappedFile
from ckptd.checkpoint.reading.read import Read, ReadCount, Rows, read_all
from ckptd.protocol.errors import SystemCallFailed, TruncatedFile

BEGIN = 4096 + 512
DATA = random_bytes(64 * 1024)


@pytest.fixture
def descriptor(tmp_path):
    """An arena with an image in it, and other bytes before and behind."""
    path = tmp_path / "arena"
    path.write_bytes(b"\xee" * BEGIN + DATA + b"\xee" * 5000)
    descriptor = os.open(path, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def image(descriptor):
    image = ImageFile("/run/a/__0_0.distcp", descriptor, begin=BEGIN, nbytes=len(DATA))
    yield image
    image.close()


def test_a_range_goes_into_its_targets_however_many_there_are(image, monkeypatch):
    monkeypatch.setattr(read_images, "TARGETS_AT_MOST", 3)
    targets = [bytearray(length) for length in (5, 1, 1000, 7, 0, 3, 9)]
    assert image.fill(100, [memoryview(target) for target in targets])
    assert b"".join(targets) == DATA[100:1125]
    assert image.read_bytes == 1025


def test_a_range_is_seen_in_the_buffer(image):
    bounce = memoryview(bytearray(3000))
    assert image.view(10, 2010, bounce) == DATA[10:2010]
    assert bounce[:2000] == DATA[10:2010]


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("row_bytes", [8, 70_000 // 64])
def test_rows_come_one_behind_the_other(image, monkeypatch, mapped, row_bytes):
    if not mapped:
        monkeypatch.setattr(MappedFile, "copy_rows", lambda *_: False)
    begins = np.array([0, 2000, 4000, 9001, 20_000])
    target = memoryview(bytearray(len(begins) * row_bytes))
    image.fill_rows(begins, row_bytes, target, blocks=(0, 2 << 20))
    assert bytes(target) == b"".join(DATA[begin : begin + row_bytes] for begin in begins)
    assert image.read_bytes == len(target)


@pytest.mark.parametrize(
    "read",
    [
        lambda image: image.fill(len(DATA) - 5, [memoryview(bytearray(6))]),
        lambda image: image.view(0, len(DATA) + 1, memoryview(bytearray(len(DATA) + 1))),
        lambda image: image.fill_rows(np.array([0, len(DATA) - 3]), 4, memoryview(bytearray(8)), blocks=(0, 0)),
    ],
    ids=["fill", "view", "rows"],
)
def test_nothing_behind_the_image_is_read(image, read):
    with pytest.raises(TruncatedFile) as caught:
        read(image)
    assert caught.value.report().facts["path"] == "/run/a/__0_0.distcp"


def test_an_arena_that_was_cut_short_is_an_error(image, descriptor):
    os.truncate(f"/proc/self/fd/{descriptor}", BEGIN + 100)
    with pytest.raises(TruncatedFile):
        image.fill(90, [memoryview(bytearray(20))])
    with pytest.raises(TruncatedFile):
        image.fill_rows(np.array([0, 50_000]), 8, memoryview(bytearray(16)), blocks=(0, 0))


def test_a_call_that_fails_is_named(image, monkeypatch):
    def fail(*_):
        raise OSError(5, "no")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(SystemCallFailed, match="pread /run/a/__0_0"):
        image.view(0, 10, memoryview(bytearray(10)))


def test_it_serves_a_load(image):
    class Images:
        name = "memory"

        def open(self, path, ranges):
            assert path == "/run/a/__0_0.distcp"
            return image

    target = np.zeros(5000, np.uint8)
    rows = np.zeros(4 * 16, np.uint8)
    reads = [
        Read("/run/a/__0_0.distcp", 1000, 5000, target.ctypes.data, "w"),
        Read("/run/a/__0_0.distcp", 0, 64, rows.ctypes.data, "v", rows=Rows(np.arange(4) * 9000, 16)),
    ]
    assert read_all(reads, threads=2, source=Images()) == ReadCount(5064, 5064)
    assert target.tobytes() == DATA[1000:6000]
    assert rows.tobytes() == b"".join(DATA[at : at + 16] for at in range(0, 36_000, 9000))
