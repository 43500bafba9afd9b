"""Rows copied out of a mapping."""

from __future__ import annotations

import os

import numpy as np
import pytest

from ckptd.checkpoint import mapped
from ckptd.checkpoint.mapped import MappedFile

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
