"""The index is found: ours before stock's."""

from __future__ import annotations

import os

import pytest
from support.checkpoints import make_checkpoint, write_checkpoint

from ckptd.checkpoint.indexing.open import read_index
from ckptd.checkpoint.stock.metadata_pickle import encode_metadata
from ckptd.protocol.errors import BadIndex, SystemCallFailed, UnknownCheckpoint


def test_our_index_comes_first(tmp_path):
    write_checkpoint(tmp_path)
    (tmp_path / ".metadata").write_bytes(b"never looked at")
    assert read_index(str(tmp_path)).has_hashes


def test_without_ours_stocks_is_read(tmp_path):
    index, _ = make_checkpoint()
    (tmp_path / ".metadata").write_bytes(encode_metadata(index, checkpoint_id="/a", save_id="b"))
    found = read_index(str(tmp_path))
    assert found.names == index.names
    assert not found.has_hashes


@pytest.mark.parametrize("name", [".ckptd", ".metadata"])
def test_a_damaged_index_is_no_reason_to_look_further(tmp_path, name):
    (tmp_path / name).write_bytes(b"damaged")
    with pytest.raises(BadIndex, match=f"{name}: "):
        read_index(str(tmp_path))


@pytest.mark.parametrize("path", ["", "missing", "file"])
def test_where_there_is_neither_there_is_no_checkpoint(tmp_path, path):
    (tmp_path / "file").touch()
    with pytest.raises(UnknownCheckpoint, match=r"neither \.ckptd nor \.metadata"):
        read_index(str(tmp_path / path))


def test_an_index_that_cannot_be_read_is_not_a_missing_one(tmp_path):
    (tmp_path / ".ckptd").mkdir()
    with pytest.raises(SystemCallFailed, match=r"read .*/.ckptd: Is a directory"):
        read_index(str(tmp_path))


@pytest.mark.parametrize("name", [".ckptd", ".metadata"])
@pytest.mark.parametrize("what", ["pipe", "device"])
def test_what_never_ends_is_no_index(tmp_path, name, what):
    if what == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(BadIndex, match="not a file"):
        read_index(str(tmp_path))
