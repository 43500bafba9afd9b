"""Which checkpoints lie in a folder."""

from __future__ import annotations

import os

import pytest
import torch
from support.managed import write_managed
from support.stock import save_stock

from ckptd.checkpoint.folder.catalog import list_entries, look_at, read_header
from ckptd.checkpoint.folder.pins import pin
from ckptd.protocol.errors import SystemCallFailed


def test_the_newest_is_first_and_tells_what_its_user_said(tmp_path):
    for step in (9, 100, 20):
        write_managed(tmp_path, step, loss=step / 2)
    entries = list_entries(str(tmp_path))
    assert [entry.step for entry in entries] == [100, 20, 9]
    assert [entry.user.metrics["loss"] for entry in entries] == [50, 10, 4.5]
    assert all(entry.complete and entry.managed and not entry.pinned for entry in entries)


def test_what_is_no_checkpoint_is_left_out(tmp_path):
    write_managed(tmp_path, 1)
    write_managed(tmp_path, 2, name=".step-2.ckptd-job-1-1-ab")
    (tmp_path / "logs").mkdir()
    (tmp_path / "step-3").write_text("a file")
    (tmp_path / "latest").symlink_to("step-1")
    assert [entry.name for entry in list_entries(str(tmp_path))] == ["step-1"]


def test_a_folder_that_is_not_there_is_empty_and_one_that_cannot_be_read_is_an_error(tmp_path):
    assert list_entries(str(tmp_path / "nothing")) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemCallFailed, match="scandir"):
        list_entries(str(tmp_path / "file"))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: (path / "__1_0.distcp").unlink(),
        lambda path: os.truncate(path / ".ckptd", 20),
        lambda path: (path / ".ckptd").write_bytes(b"\xff" * 64),
        lambda path: (path / ".ckptd").write_bytes(b""),
        lambda path: ((path / ".ckptd").unlink(), (path / ".metadata").unlink()),
    ],
    ids=["image", "cut index", "garbage", "empty", "no index"],
)
def test_what_is_not_whole_is_said_to_be_incomplete(tmp_path, spoil):
    path = write_managed(tmp_path, 5)
    spoil(path)
    found = look_at(str(path))
    assert not found.complete
    assert found.step == 5


def test_one_that_was_copied_under_another_name_is_its_users_own(tmp_path):
    write_managed(tmp_path, 7, name="best-so-far")
    write_managed(tmp_path, 7, name="backup-8")
    assert [(entry.step, entry.managed) for entry in list_entries(str(tmp_path))] == [(7, False), (7, False)]


def test_one_of_stocks_is_listed_by_its_name_and_is_nobodys_to_remove(tmp_path):
    save_stock({"w": torch.ones(2)}, tmp_path / "step_000012")
    [found] = list_entries(str(tmp_path))
    assert (found.step, found.complete, found.managed, found.user) == (12, True, False, None)


def test_a_pin_is_seen(tmp_path):
    path = write_managed(tmp_path, 7)
    pin(str(path))
    assert look_at(str(path)).pinned


def test_the_header_is_read_without_the_columns(tmp_path):
    path = write_managed(tmp_path, 7)
    whole = read_header(str(path))
    assert whole["save_id"] == "a save"
    length = int.from_bytes((path / ".ckptd").read_bytes()[:8], "little")
    os.truncate(path / ".ckptd", 8 + length)
    assert read_header(str(path)) == whole
