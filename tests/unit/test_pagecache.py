"""The probe tells what is cached and brings nothing in."""

import os

import pytest

from ckptd.checkpoint.reading import pagecache
from ckptd.checkpoint.reading.pagecache import PageCacheProbe

PAGES = 64
BYTES = PAGES * 4096


@pytest.fixture
def file(tmp_path):
    """A durable file of some pages, of which nothing is cached."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(BYTES))
    descriptor = os.open(path, os.O_RDWR)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # a read brings in no neighbours
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    yield descriptor
    os.close(descriptor)


@pytest.fixture(params=["cachestat", "mincore"])
def probe(request, file, monkeypatch):
    if request.param == "mincore":  # as before Linux 6.5
        monkeypatch.setattr(pagecache, "_CACHESTAT", None)
    made = PageCacheProbe(file, BYTES)
    yield made
    made.close()


def test_a_file_that_was_dropped_is_not_cached(probe):
    assert not probe.is_cached(0, BYTES)


def test_a_part_that_was_read_is_cached_and_the_rest_is_not(probe, file):
    os.pread(file, 2 * 4096, 8 * 4096)
    assert probe.is_cached(8 * 4096, 2 * 4096)
    assert probe.is_cached(8 * 4096 + 100, 4096)
    assert not probe.is_cached(7 * 4096, 2 * 4096)


def test_asking_brings_nothing_in(probe):
    for page in range(PAGES):
        probe.is_cached(page * 4096, 4096)
    assert not any(probe.is_cached(page * 4096, 4096) for page in range(PAGES))


def test_an_empty_file_is_never_cached(tmp_path):
    descriptor = os.open(tmp_path / "empty", os.O_RDWR | os.O_CREAT)
    assert not PageCacheProbe(descriptor, 0).is_cached(0, 1)
    os.close(descriptor)


def test_a_file_of_someone_else_counts_as_not_cached_where_mincore_would_pretend(file, monkeypatch):
    monkeypatch.setattr(pagecache, "_CACHESTAT", None)
    os.fchown(file, 65534, 65534) if os.geteuid() == 0 else pytest.skip("needs root to give a file away")
    os.pread(file, BYTES, 0)
    assert not PageCacheProbe(file, BYTES).is_cached(0, BYTES)
