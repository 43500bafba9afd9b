"""Damage after the commit is found and named, by a load and by ``ckptd verify``; it never reaches the model."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.nursery import state

from ckptd.checkpoint.indexing.open import read_index
from ckptd.protocol.errors import BadIndex, MissingFile, TruncatedFile, UnknownCheckpoint, WrongBits

CKPTD = [str(Path(sys.executable).with_name("ckptd"))]


def verify(*arguments):
    """Run ``ckptd verify`` and return exit status, stdout and stderr."""
    done = subprocess.run(
        [*CKPTD, "verify", *map(str, arguments)], capture_output=True, text=True, timeout=30, check=False
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def saved(daemon, client, tmp_path):
    path = tmp_path / "a"
    client.save({**state(2), "text": ["some", "object"]}, checkpoint_id=path)
    return path


def load(client, path):
    target = {**state(2, -1.0), "text": None}
    client.load(target, checkpoint_id=path)
    return target


def flip_bit(path, at, bit=3):
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


@pytest.mark.parametrize("missing", ["folder", "contents"])
def test_an_unknown_id_is_named(runtime, client, tmp_path, missing):
    path = tmp_path / "no such checkpoint"
    if missing == "contents":
        path.mkdir()
    with pytest.raises(UnknownCheckpoint, match="no such checkpoint"):
        load(client, path)
    status, _, errors = verify(path)
    assert status == 1
    assert "no such checkpoint" in errors


@pytest.mark.parametrize("place", ["first byte", "middle", "last byte"])
def test_a_wrong_bit_in_a_tensor_is_found_and_named(saved, client, place):
    index = read_index(str(saved))
    row = [index.names[name] for name in index.item_name].index("model.w")
    begin, nbytes = int(index.data_offset[row]), int(index.data_bytes[row])
    flip_bit(saved / "__0_0.distcp", begin + {"first byte": 0, "middle": nbytes // 2, "last byte": nbytes - 1}[place])
    with pytest.raises(WrongBits) as caught:
        load(client, saved)
    assert (caught.value.path, caught.value.item) == (str(saved / "__0_0.distcp"), "model.w")
    assert caught.value.offset == begin
    if place == "middle":
        status, _, errors = verify(saved)
        assert status == 1
        assert "model.w" in errors
        assert str(saved / "__0_0.distcp") in errors
        assert str(begin) in errors


@pytest.mark.parametrize("item", ["model.b", "step", "text"])
def test_a_wrong_bit_in_any_kind_of_item_is_found(saved, client, item):
    index = read_index(str(saved))
    row = [index.names[name] for name in index.item_name].index(item)
    flip_bit(saved / "__0_0.distcp", int(index.data_offset[row]) + int(index.data_bytes[row]) // 2)
    with pytest.raises(WrongBits, match=item):
        load(client, saved)


@pytest.mark.parametrize("part", [0.0, 0.02, 0.5, 0.99])
def test_a_wrong_bit_in_the_index_is_found(saved, client, part):
    path = saved / ".ckptd"
    flip_bit(path, min(int(path.stat().st_size * part), path.stat().st_size - 1))
    with pytest.raises(BadIndex, match=r"\.ckptd"):
        load(client, saved)


def test_a_wrong_bit_in_stocks_metadata_does_no_harm_to_us(saved, client):
    flip_bit(saved / ".metadata", (saved / ".metadata").stat().st_size // 2)
    assert torch.equal(load(client, saved)["model"]["w"], state(2)["model"]["w"])


def test_a_missing_file_is_named(saved, client):
    (saved / "__0_0.distcp").unlink()
    with pytest.raises(MissingFile, match=r"a/__0_0\.distcp"):
        load(client, saved)
    status, _, errors = verify(saved)
    assert status == 1
    assert "__0_0.distcp" in errors


@pytest.mark.parametrize("kept", [0, 4096, -1])
def test_a_truncated_file_is_named_with_both_sizes(saved, client, kept):
    path = saved / "__0_0.distcp"
    index = read_index(str(saved))
    end = int((index.record_offset + index.record_bytes).max())
    size = kept if kept >= 0 else end - 1
    with path.open("r+b") as file:
        file.truncate(size)
    with pytest.raises(TruncatedFile) as caught:
        load(client, saved)
    assert caught.value.path == str(path)
    assert caught.value.found_bytes == size
    assert caught.value.wanted_bytes > size


def test_verify_says_good_and_knows_wrong_usage(saved):
    status, out, _ = verify(saved)
    assert status == 0
    assert "good" in out
    assert verify()[0] == 2
    assert verify(saved, "--no-such-option")[0] == 2


def test_damage_to_a_newer_checkpoint_leaves_the_older_one_loadable(saved, client, tmp_path):
    client.save({**state(2, 5.0), "text": None}, checkpoint_id=tmp_path / "b")
    flip_bit(tmp_path / "b" / "__0_0.distcp", 100_000)
    with pytest.raises(WrongBits):
        load(client, tmp_path / "b")
    assert torch.equal(load(client, saved)["model"]["w"], state(2)["model"]["w"])
