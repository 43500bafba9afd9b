"""Stock's checkpoints made ours: hashes, aligned images, the same chunks; and damage that is found on the way."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import torch
from support.states import assert_same, everything
from support.stock import load_stock, save_stock

from ckptd.checkpoint.formats import dcp_target
from ckptd.checkpoint.formats.checkpoint import CheckpointSource
from ckptd.checkpoint.formats.convert import Format, Wish, convert
from ckptd.checkpoint.formats.source import Box
from ckptd.checkpoint.indexing.open import read_index
from ckptd.checkpoint.publishing import commit as commit_module
from ckptd.checkpoint.verify import verify_checkpoint
from ckptd.protocol.errors import (
    BadConfig,
    BadIndex,
    BadPlan,
    MissingFile,
    OutputExists,
    SystemCallFailed,
    TruncatedFile,
    WrongBits,
)

ROWS = [((0, 0), (100, 500)), ((100, 0), (300, 500))]
COLUMNS = [((0, 0), (400, 125)), ((0, 125), (400, 375))]


@pytest.fixture
def stock(tmp_path):
    state = {"rows": torch.arange(200_000.0).reshape(400, 500), "step": 7, "none": torch.empty(0, 3)}
    state["columns"] = state["rows"] * 2
    save_stock(state, tmp_path / "stock", boxes={"rows": ROWS, "columns": COLUMNS}, files=3)
    return tmp_path / "stock"


def make_ours(source, target, **wish):
    with CheckpointSource(str(source)) as opened:
        convert(opened, str(target), Format.DCP, wish=Wish(**wish))


def test_everything_becomes_ours_and_stock_reads_it(tmp_path):
    save_stock(everything(2), tmp_path / "stock")
    make_ours(tmp_path / "stock", tmp_path / "ours")
    report = verify_checkpoint(str(tmp_path / "ours"))
    assert (report.good, report.hashes_checked) == (True, True)
    assert_same(load_stock(tmp_path / "ours"), load_stock(tmp_path / "stock"))
    ours, theirs = read_index(str(tmp_path / "ours")), read_index(str(tmp_path / "stock"))
    grad = {name: flag for name, flag in zip(ours.names, ours.requires_grad.tolist(), strict=True) if flag}
    assert grad == {"grad": 1}
    assert dict(zip(ours.names, ours.paths, strict=True)) == dict(zip(theirs.names, theirs.paths, strict=True))
    assert ours.header["origin"] == "ckptd convert"


def test_chunks_and_files_stay_and_values_are_aligned(stock, tmp_path):
    make_ours(stock, tmp_path / "ours")
    ours, theirs = read_index(str(tmp_path / "ours")), read_index(str(stock))
    assert len(theirs.files) == 3
    assert ours.files == ["__0_0.distcp", "__1_0.distcp", "__2_0.distcp"]
    assert boxes(ours) == boxes(theirs)
    large = ours.data_bytes >= 4096
    assert large.sum() == 4
    assert (ours.data_offset[large] % 4096 == 0).all()
    assert verify_checkpoint(str(tmp_path / "ours")).good


def boxes(index):
    columns = (index.item_offsets.tolist(), index.item_sizes.tolist())
    names = [index.names[row] for row in index.item_name]
    return sorted(zip(names, *columns, strict=True))


def test_ours_can_be_made_again_and_keeps_every_byte(stock, tmp_path):
    make_ours(stock, tmp_path / "one")
    make_ours(tmp_path / "one", tmp_path / "two")
    one, two = read_index(str(tmp_path / "one")), read_index(str(tmp_path / "two"))
    assert np.array_equal(np.sort(one.item_hash), np.sort(two.item_hash))
    for file in one.files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_an_empty_checkpoint_stays_empty(tmp_path):
    save_stock({}, tmp_path / "stock")
    make_ours(tmp_path / "stock", tmp_path / "ours")
    assert verify_checkpoint(str(tmp_path / "ours")).good
    assert read_index(str(tmp_path / "ours")).names == []


def test_what_exists_is_replaced_only_if_asked(stock, tmp_path):
    save_stock({"old": torch.ones(1)}, tmp_path / "ours")
    with pytest.raises(OutputExists, match="--overwrite"):
        make_ours(stock, tmp_path / "ours")
    assert read_index(str(tmp_path / "ours")).names == ["old"]
    make_ours(stock, tmp_path / "ours", overwrite=True)
    assert "rows" in read_index(str(tmp_path / "ours")).names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "stock"]


@pytest.mark.parametrize("target", ["stock", "stock/inner", "link"])
def test_output_within_the_input_is_refused(stock, tmp_path, target):
    (tmp_path / "link").symlink_to("stock")
    before = sorted(os.listdir(stock))
    with pytest.raises(BadConfig, match="choose another place"):
        make_ours(stock, tmp_path / target, overwrite=True)
    assert sorted(os.listdir(stock)) == before


class TestDamage:
    def test_a_wrong_bit_in_ours_is_named_and_nothing_is_written(self, stock, tmp_path):
        make_ours(stock, tmp_path / "ours")
        index = read_index(str(tmp_path / "ours"))
        item = int(np.flatnonzero(index.data_bytes > 4096)[0])
        file = tmp_path / "ours" / index.files[index.item_file[item]]
        flip(file, int(index.data_offset[item]) + 5)
        with pytest.raises(WrongBits, match="does not match its hash") as caught:
            make_ours(tmp_path / "ours", tmp_path / "again")
        assert caught.value.offset == index.data_offset[item]
        assert not (tmp_path / "again").exists()
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]

    def test_a_wrong_bit_in_an_object_is_found(self, stock, tmp_path):
        make_ours(stock, tmp_path / "ours")
        index = read_index(str(tmp_path / "ours"))
        item = int(np.flatnonzero(index.item_name == index.names.index("step"))[0])
        flip(tmp_path / "ours" / index.files[index.item_file[item]], int(index.data_offset[item]) + 1)
        with pytest.raises(WrongBits, match="'step'"):
            make_ours(tmp_path / "ours", tmp_path / "again")

    def test_a_missing_file(self, stock, tmp_path):
        (stock / "__0_1.distcp").unlink()
        with pytest.raises(MissingFile, match="__0_1"):
            make_ours(stock, tmp_path / "ours")

    def test_a_cut_file(self, stock, tmp_path):
        os.truncate(stock / "__0_0.distcp", 700)
        with pytest.raises((TruncatedFile, BadIndex)):
            make_ours(stock, tmp_path / "ours")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["stock"]

    def test_a_gap_between_chunks(self, tmp_path):
        save_stock({"w": torch.ones(4, 4)}, tmp_path / "stock", boxes={"w": [((0, 0), (4, 2)), ((0, 2), (4, 2))]})
        data = (tmp_path / "stock" / ".metadata").read_bytes()
        # The second chunk is said to be one column wide.
        assert data.count(b"K\x04K\x02\x86") == 2
        at = data.rindex(b"K\x04K\x02\x86")
        (tmp_path / "stock" / ".metadata").write_bytes(data[:at] + b"K\x04K\x01\x86" + data[at + 5 :])
        with pytest.raises(BadPlan, match=r"w: a gap|12 of 16"):
            make_ours(tmp_path / "stock", tmp_path / "ours")

    def test_a_record_of_another_tensor(self, stock, tmp_path):
        save_stock({"w": torch.ones(4)}, tmp_path / "a")
        save_stock({"w": torch.ones(2, 2)}, tmp_path / "b")
        length = read_index(str(tmp_path / "a")).record_bytes[0]
        other = (tmp_path / "b" / "__0_0.distcp").read_bytes()
        (tmp_path / "a" / "__0_0.distcp").write_bytes(other.ljust(length, b"\0"))
        with pytest.raises(BadIndex, match=r"another tensor than the metadata says|cannot be read"):
            make_ours(tmp_path / "a", tmp_path / "ours")


@pytest.mark.parametrize("call", ["fsync", "rename", "commit"])
def test_a_failure_leaves_no_trace(stock, tmp_path, monkeypatch, call):
    def fail(*_, **__):
        raise OSError(errno.EIO, "broken")

    if call == "commit":
        monkeypatch.setattr(dcp_target, "commit", lambda *_: fail())
        wanted = OSError
    else:
        if call == "rename":
            monkeypatch.setattr(commit_module, "rename_new", lambda *_: False)
        monkeypatch.setattr(os, call, fail)
        wanted = SystemCallFailed
    with pytest.raises(wanted):
        make_ours(stock, tmp_path / "ours")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["stock"]


def flip(file, offset):
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


def test_many_chunks_cost_no_more_than_their_number(tmp_path):
    """Work that grows with the square of the chunks would take minutes."""
    rows = 400
    boxes = [((row, 0), (1, 2)) for row in range(rows)]
    save_stock({"w": torch.arange(2.0 * rows).reshape(rows, 2)}, tmp_path / "a", boxes={"w": boxes})
    hashed = []
    original = Box.__hash__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Box, "__hash__", lambda self: hashed.append(self) or original(self))
        make_ours(tmp_path / "a", tmp_path / "ours")
    assert len(hashed) <= 4 * rows
    assert len(read_index(str(tmp_path / "ours")).item_name) == rows
