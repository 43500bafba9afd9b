"""Any set of ranges of any files, in any order, equals what stands in the files."""

from __future__ import annotations

import os
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.images import random_bytes
from xxhash import xxh3_64_intdigest

from ckptd.checkpoint.reading import read as read_module
from ckptd.checkpoint.reading import requests as read_requests
from ckptd.checkpoint.reading.images import ImageFile
from ckptd.checkpoint.reading.pagecache import PageCacheProbe
from ckptd.checkpoint.reading.read import Read, read_all
from ckptd.protocol.errors import WrongBits

SIZE = 48 * 1024 + 77
CONTENT = [random_bytes(SIZE, seed=seed) for seed in range(2)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for number, content in enumerate(CONTENT):
        (folder / f"{number}").write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read_requests, "CHUNK_BYTES", 8 * 1024)  # so that small files have many
        patch.setattr(read_requests, "MERGE_GAP_BYTES", 512)
        yield [str(folder / f"{number}") for number in range(2)]


offsets = st.integers(0, SIZE) | st.integers(0, SIZE // 4096).map(lambda page: page * 4096)
ranges = st.lists(st.tuples(st.integers(0, 1), offsets, st.integers(0, 20_000), st.integers(0, 7)), max_size=8)


class Images:
    """Files that are read as images in shared memory are."""

    name = "memory"

    def __init__(self, path=None, content=None):
        self._path, self._content = path, content

    def open(self, path, ranges):
        descriptor = os.open(path, os.O_RDONLY) if path != self._path else os.memfd_create("spoilt")
        if path == self._path:
            os.write(descriptor, self._content)
        return Image(path, descriptor, begin=0, nbytes=SIZE)


class Image(ImageFile):
    def __init__(self, path, descriptor, **where):
        super().__init__(path, descriptor, **where)
        self._own = descriptor

    def close(self):
        super().close()
        os.close(self._own)


def reads_of(files, wanted, handed):
    """Return reads of random ranges, and for each its target and what shall stand there."""
    reads, buffers = [], []
    for number, (file, offset, nbytes, shift) in enumerate(wanted):
        content = CONTENT[file][offset : offset + nbytes]
        buffer = np.full(len(content) + shift, 0xEE, np.uint8)
        buffers.append((buffer[shift:], content))
        address = buffer.ctypes.data + shift
        expected = xxh3_64_intdigest(content)
        reads.append(
            Read(files[file], offset, len(content), address, f"{number}", expected, lambda n=number: handed.append(n))
        )
    return reads, buffers


@settings(max_examples=40, deadline=None)
@given(wanted=ranges, cached=st.booleans(), threads=st.integers(1, 3))
def test_random_ranges_equal_the_files(files, wanted, cached, threads):
    handed = []
    reads, buffers = reads_of(files, wanted, handed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PageCacheProbe, "is_cached", lambda self, offset, nbytes: cached)
        patch.setattr(PageCacheProbe, "is_all_or_nothing", lambda self, offset, nbytes: None)
        read_all(reads, threads=threads)
    assert all(target.tobytes() == content for target, content in buffers)
    assert sorted(handed) == list(range(len(wanted)))


@settings(max_examples=100, deadline=None)
@given(wanted=ranges, cores=st.integers(1, 3), at_once=st.integers(1, 8), step_bytes=st.sampled_from([1024, 3000]))
def test_random_ranges_equal_what_lies_in_memory(files, wanted, cores, at_once, step_bytes):
    handed = []
    reads, buffers = reads_of(files, wanted, handed)
    with in_small_steps(cores, at_once, step_bytes):
        read_all(reads, source=Images(), in_memory=True)
    assert all(target.tobytes() == content for target, content in buffers)
    assert sorted(handed) == list(range(len(wanted)))


@settings(max_examples=100, deadline=None)
@given(wanted=ranges.filter(any), place=st.integers(0, SIZE - 1), cores=st.integers(1, 3), step_bytes=st.just(1024))
def test_a_wrong_bit_in_memory_is_found_wherever_it_lies(files, wanted, place, cores, step_bytes):
    spoilt = bytearray(CONTENT[0])
    spoilt[place] ^= 1
    hit = [n for n, (file, offset, nbytes, _) in enumerate(wanted) if file == 0 and offset <= place < offset + nbytes]
    handed = []
    reads, buffers = reads_of(files, wanted, handed)
    with in_small_steps(cores, 8, step_bytes):
        if hit:
            with pytest.raises(WrongBits):
                read_all(reads, source=Images(files[0], bytes(spoilt)), in_memory=True)
        else:
            read_all(reads, source=Images(files[0], bytes(spoilt)), in_memory=True)
            assert all(target.tobytes() == content for target, content in buffers)
    assert not set(handed) & set(hit)


@contextmanager
def in_small_steps(cores, at_once, step_bytes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
        patch.setattr(read_module, "_FROM_MEMORY_AT_ONCE", at_once)
        patch.setattr(read_module, "_STEP_BYTES", step_bytes)
        yield
