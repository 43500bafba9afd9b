"""A checkpoint is compared with its index, and each fault is named."""

from __future__ import annotations

import dataclasses
import errno
import os

import numpy as np
import pytest
import xxhash
from support.checkpoints import FILES, many_items, write_checkpoint

from ckptd.checkpoint import verify
from ckptd.checkpoint.indexing.index import encode_index
from ckptd.checkpoint.stock.metadata_pickle import encode_metadata
from ckptd.checkpoint.verify import verify_checkpoint
from ckptd.protocol.errors import MissingFile, SystemCallFailed, TruncatedFile, UnknownCheckpoint, WrongBits


def facts(report):
    return [(type(fault), vars(fault)) for fault in report.faults]


@pytest.mark.parametrize("threads", [1, 3])
def test_a_good_checkpoint_has_no_faults(tmp_path, threads):
    index = write_checkpoint(tmp_path)
    news = []
    report = verify_checkpoint(str(tmp_path), threads=threads, progress=lambda done, total: news.append((done, total)))
    assert report.good
    assert report.hashes_checked
    assert (report.path, report.items) == (str(tmp_path), len(index.item_name))
    assert report.bytes == index.data_bytes.sum()
    assert news == sorted(news)
    assert news[-1] == (report.bytes, report.bytes)


@pytest.mark.parametrize("read_bytes", [7, 64, 600, 1000, 1500, 8 << 20])
def test_each_wrong_bit_is_named(tmp_path, monkeypatch, read_bytes):
    monkeypatch.setattr(verify, "READ_BYTES", read_bytes)
    index = write_checkpoint(tmp_path)
    for item in np.flatnonzero(index.data_bytes).tolist():
        path = tmp_path / index.files[index.item_file[item]]
        good = path.read_bytes()
        for at in (0, index.data_bytes[item] - 1):
            changed = bytearray(good)
            changed[index.data_offset[item] + at] ^= 4
            path.write_bytes(changed)
            [fault] = verify_checkpoint(str(tmp_path)).faults
            assert isinstance(fault, WrongBits)
            name = index.names[index.item_name[item]]
            assert vars(fault) == {"path": str(path), "item": name, "offset": index.data_offset[item]}
        path.write_bytes(good)
    assert verify_checkpoint(str(tmp_path)).good


def test_all_faults_are_found_at_once(tmp_path):
    index = write_checkpoint(tmp_path)
    (tmp_path / FILES[0]).unlink()
    path = tmp_path / FILES[1]
    size = path.stat().st_size
    first = int(np.flatnonzero(index.item_file == 1)[0])
    with path.open("r+b") as file:
        file.truncate(size - 1)
        file.seek(int(index.data_offset[first]))
        file.write(b"\xaa\xbb\xcc\xdd")
    name, offset = index.names[index.item_name[first]], int(index.data_offset[first])
    assert facts(verify_checkpoint(str(tmp_path))) == [
        (MissingFile, {"path": str(tmp_path / FILES[0])}),
        (TruncatedFile, {"path": str(path), "wanted_bytes": size, "found_bytes": size - 1}),
        (WrongBits, {"path": str(path), "item": name, "offset": offset}),
    ]


def test_progress_reaches_the_end_though_files_are_missing(tmp_path):
    write_checkpoint(tmp_path)
    news = []
    for file in FILES:
        (tmp_path / file).unlink()
    report = verify_checkpoint(str(tmp_path), progress=lambda done, total: news.append((done, total)))
    assert news == [(report.bytes, report.bytes)]


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo], ids=["directory", "pipe"])
def test_what_is_no_file_is_missing(tmp_path, make):
    write_checkpoint(tmp_path)
    (tmp_path / FILES[0]).unlink()
    make(tmp_path / FILES[0])
    assert facts(verify_checkpoint(str(tmp_path))) == [(MissingFile, {"path": str(tmp_path / FILES[0])})]


def test_a_failing_read_is_a_fault(tmp_path, monkeypatch):
    write_checkpoint(tmp_path)

    def fail(*arguments):
        raise OSError(errno.EIO, "cut")

    monkeypatch.setattr(os, "preadv", fail)
    faults = verify_checkpoint(str(tmp_path)).faults
    assert [vars(fault) for fault in faults] == [
        {"call": "pread", "path": str(tmp_path / file), "errno": errno.EIO} for file in FILES
    ]
    assert {type(fault) for fault in faults} == {SystemCallFailed}


def test_a_file_that_shrinks_meanwhile_is_truncated(tmp_path, monkeypatch):
    write_checkpoint(tmp_path)
    monkeypatch.setattr(os, "preadv", lambda *arguments: 0)
    assert {type(fault) for fault in verify_checkpoint(str(tmp_path)).faults} == {TruncatedFile}


def test_short_reads_are_continued(tmp_path, monkeypatch):
    write_checkpoint(tmp_path)
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: read(fd, [buffers[0][:11]], offset))
    assert verify_checkpoint(str(tmp_path)).good


def test_of_a_stock_checkpoint_the_structure_is_checked(tmp_path):
    index = write_checkpoint(tmp_path)
    (tmp_path / ".ckptd").unlink()
    (tmp_path / ".metadata").write_bytes(encode_metadata(index, checkpoint_id="/a", save_id="b"))
    report = verify_checkpoint(str(tmp_path))
    assert report.good
    assert not report.hashes_checked
    assert report.bytes == index.record_bytes.sum()
    os.truncate(tmp_path / FILES[0], 20)
    assert [type(fault) for fault in verify_checkpoint(str(tmp_path)).faults] == [TruncatedFile]


def test_where_nothing_is_nothing_is_verified(tmp_path):
    with pytest.raises(UnknownCheckpoint):
        verify_checkpoint(str(tmp_path))


def test_neighbours_are_read_together(tmp_path, monkeypatch):
    index = many_items(200)
    offsets = np.arange(200) // 2 * 600
    data = np.random.default_rng(1).integers(0, 256, (100, 600), np.uint8)
    for file in FILES:
        (tmp_path / file).write_bytes(data.tobytes())
    hashes = [xxhash.xxh3_64_intdigest(row[:512].tobytes()) for row in np.repeat(data, 2, axis=0)]
    places = {"record_offset": offsets, "record_bytes": np.full(200, 600), "data_offset": offsets}
    index = dataclasses.replace(index, item_hash=np.array(hashes, np.uint64), **places)
    (tmp_path / ".ckptd").write_bytes(encode_index(index))
    calls, read = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *arguments: calls.append(arguments) or read(*arguments))
    assert verify_checkpoint(str(tmp_path)).good
    assert len(calls) == 2
