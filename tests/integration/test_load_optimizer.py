"""Resuming an optimizer when parameters have been frozen, thawed or added since."""

from __future__ import annotations

import pytest
import torch
from support.clients import stock_load
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from ckptd.protocol.errors import MissingKeys


def trained(*, frozen: bool) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Return a small model after one step, its second layer frozen or not."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    model[1].requires_grad_(not frozen)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


def states(model, optimizer, kind: str) -> dict:
    """Return the optimizer's state as torch gives it in one of three ways."""
    if kind == "own":
        return {"optimizer": optimizer.state_dict()}
    options = StateDictOptions(flatten_optimizer_state_dict=kind == "flat")
    return {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}


@pytest.mark.parametrize("kind", ["own", "by name"])
def test_a_thawed_parameter_begins_anew_and_the_others_go_on(daemon, client, tmp_path, kind):
    saved = states(*trained(frozen=True), kind)
    client.save(saved, checkpoint_id=tmp_path / "a")
    wanted = states(*trained(frozen=False), kind)
    values = wanted["optimizer"]["state"].values()
    for entries in values:
        entries["exp_avg"].fill_(7.0)
    report = client.load(wanted, checkpoint_id=tmp_path / "a")
    assert len(report.absent_optimizer_state) == 2 * len(("step", "exp_avg", "exp_avg_sq"))
    assert report.complete
    first, *_, last = values
    assert torch.equal(first["exp_avg"], next(iter(saved["optimizer"]["state"].values()))["exp_avg"])
    assert (last["exp_avg"] == 7.0).all()
    assert "without optimizer state" in str(report)


def test_a_flat_state_dict_is_understood_as_well(daemon, client, tmp_path):
    model, optimizer = trained(frozen=False)
    saved = states(model, optimizer, "flat")
    stepped = {key: value for key, value in saved["optimizer"].items() if not key.startswith("state.1.")}
    client.save({"optimizer": stepped}, checkpoint_id=tmp_path / "a")
    report = client.load(saved, checkpoint_id=tmp_path / "a")
    assert {name.rpartition(".")[0] for name in report.absent_optimizer_state} == {
        "optimizer.state.1.weight",
        "optimizer.state.1.bias",
    }


def test_half_of_a_parameters_state_is_refused_as_it_is_by_torch(daemon, client, tmp_path):
    saved = states(*trained(frozen=False), "own")
    del saved["optimizer"]["state"][1]["exp_avg_sq"]
    client.save(saved, checkpoint_id=tmp_path / "a")
    wanted = states(*trained(frozen=False), "own")
    before = wanted["optimizer"]["state"][0]["exp_avg"].clone()
    with pytest.raises(MissingKeys, match=r"optimizer.state.1.exp_avg_sq \(1 in all"):
        client.load(wanted, checkpoint_id=tmp_path / "a")
    with pytest.raises(CheckpointException):
        stock_load(wanted, tmp_path / "a")
    assert torch.equal(wanted["optimizer"]["state"][0]["exp_avg"], before)
