"""Checkpoints as older torch wrote them."""

from __future__ import annotations

import pytest
import torch
from support.clients import stock_load, stock_save
from torch.distributed.checkpoint import _version


def state(value: float) -> dict:
    """A state dict with lists that hold no tensor, which torch before 2.4 took for one object each."""
    return {
        "model": {"w": torch.full((3,), value)},
        "optimizer": {
            "state": {"w": {"exp_avg": torch.full((3,), value), "step": torch.tensor(value)}},
            "param_groups": [{"lr": value, "params": ["w"], "betas": (value, 0.9)}],
        },
        "history": [value, [value]],
    }


@pytest.fixture
def before_2_4(monkeypatch, tmp_path):
    """A checkpoint with the names that torch gave before 2.4."""
    with monkeypatch.context() as patch:
        patch.setattr(_version, "_derived_version", "2_3")
        stock_save(state(1.0), tmp_path / "old")
    return tmp_path / "old"


def test_lists_that_were_one_object_come_back(client, before_2_4):
    ours, theirs = state(0.0), state(0.0)
    report = client.load(ours, checkpoint_id=before_2_4)
    stock_load(theirs, before_2_4)
    assert report.complete
    assert report.unexpected == ()
    assert (
        ours["optimizer"]["param_groups"]
        == theirs["optimizer"]["param_groups"]
        == state(1.0)["optimizer"]["param_groups"]
    )
    assert ours["history"] == theirs["history"] == [1.0, [1.0]]
    assert torch.equal(ours["optimizer"]["state"]["w"]["exp_avg"], torch.ones(3))


def test_names_of_today_are_preferred(client, tmp_path):
    stock_save(state(1.0), tmp_path / "new")
    ours = state(0.0)
    report = client.load(ours | {"more": 1}, checkpoint_id=tmp_path / "new", strict=False)
    assert report.missing == ("more",)
    assert ours["optimizer"]["param_groups"] == state(1.0)["optimizer"]["param_groups"]
