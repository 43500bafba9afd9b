"""What can be told of a folder's checkpoints without reading a tensor."""

from __future__ import annotations

import os

import pytest
import torch
from support.checkpoints import write_checkpoint
from support.stock import save_stock

from ckptd.checkpoint.formats.summary import State, find_checkpoints, summarise
from ckptd.protocol.errors import BadIndex, MissingFile, SystemCallFailed, TruncatedFile


@pytest.fixture
def folder(tmp_path):
    for step in (10, 9):
        save_stock({"w": torch.ones(3), "n": 1}, tmp_path / "run" / f"step-{step}")
    (tmp_path / "ours").mkdir()
    write_checkpoint(tmp_path / "ours")
    return tmp_path


def found(folder):
    return [os.path.relpath(path, folder) for path in find_checkpoints(str(folder))]


def test_checkpoints_are_found_at_any_depth_in_the_order_of_their_numbers(folder):
    assert found(folder) == ["ours", "run/step-9", "run/step-10"]
    assert found(folder / "ours") == ["."]


def test_links_hidden_folders_and_what_lies_in_a_checkpoint_are_left_out(folder):
    (folder / "run" / "latest").symlink_to("step-10")
    (folder / "run" / "step-9" / "inner").mkdir()
    (folder / "run" / "step-9" / "inner" / ".metadata").touch()
    (folder / ".git").mkdir()
    (folder / ".git" / ".metadata").touch()
    assert found(folder) == ["ours", "run/step-9", "run/step-10"]


def test_a_folder_that_is_not_there():
    with pytest.raises(SystemCallFailed, match="scandir"):
        list(find_checkpoints("/nowhere"))


def test_of_stocks(folder):
    path = folder / "run" / "step-9"
    summary = summarise(str(path))
    assert (summary.state, summary.fault) == (State.COMPLETE, None)
    assert (summary.tensors, summary.objects, summary.world_size) == (1, 1, 1)
    assert summary.origin == "torch.distributed.checkpoint"
    assert summary.bytes == sum(file.stat().st_size for file in path.iterdir())
    assert summary.saved_unix_s == (path / ".metadata").stat().st_mtime


def test_of_ours(folder):
    summary = summarise(str(folder / "ours"))
    assert (summary.state, summary.origin, summary.world_size) == (State.COMPLETE, "ckptd", 2)
    assert (summary.tensors, summary.objects) == (5, 2)


def test_what_is_not_published_is_unfinished(folder):
    hidden = folder / "run" / ".step-11.ckptd-train_py-1-2-0123abcd"
    (folder / "run" / "step-9").rename(hidden)
    (folder / "run" / "step-10" / ".metadata").unlink()
    states = {os.path.relpath(path, folder): summarise(path).state for path in find_checkpoints(str(folder / "run"))}
    assert states == {
        "run/.step-11.ckptd-train_py-1-2-0123abcd": State.UNFINISHED,
        "run/step-10": State.UNFINISHED,
    }
    assert summarise(str(hidden)).bytes > 0


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda path: (path / "__0_0.distcp").unlink(), MissingFile),
        (lambda path: os.truncate(path / "__0_0.distcp", 100), TruncatedFile),
        (lambda path: (path / ".metadata").write_bytes(b"cos\nsystem\n."), BadIndex),
        (lambda path: (path / ".metadata").write_bytes(b""), BadIndex),
    ],
)
def test_damage_is_told(folder, spoil, fault):
    spoil(folder / "run" / "step-9")
    summary = summarise(str(folder / "run" / "step-9"))
    assert summary.state is State.DAMAGED
    assert isinstance(summary.fault, fault)
