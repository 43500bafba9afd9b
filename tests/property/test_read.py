"""Any set of ranges of any files, in any order, equals what stands in the files."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.images import random_bytes
from xxhash import xxh3_64_intdigest

from ckptd.checkpoint.reading import requests as read_requests
from ckptd.checkpoint.reading.pagecache import PageCacheProbe
from ckptd.checkpoint.reading.read import Read, read_all

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


@settings(max_examples=40, deadline=None)
@given(wanted=ranges, cached=st.booleans(), threads=st.integers(1, 3))
def test_random_ranges_equal_the_files(files, wanted, cached, threads):
    reads, buffers, handed = [], [], []
    for number, (file, offset, nbytes, shift) in enumerate(wanted):
        content = CONTENT[file][offset : offset + nbytes]
        buffer = np.full(len(content) + shift, 0xEE, np.uint8)
        target = buffer[shift:]
        buffers.append((target, content))
        address = buffer.ctypes.data + shift
        expected = xxh3_64_intdigest(content)
        reads.append(
            Read(files[file], offset, len(content), address, f"{number}", expected, lambda n=number: handed.append(n))
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PageCacheProbe, "is_cached", lambda self, offset, nbytes: cached)
        patch.setattr(PageCacheProbe, "is_all_or_nothing", lambda self, offset, nbytes: None)
        read_all(reads, threads=threads)
    assert all(target.tobytes() == content for target, content in buffers)
    assert sorted(handed) == list(range(len(wanted)))
