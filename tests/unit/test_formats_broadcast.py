"""Broadcasting readers without a group to broadcast in: signatures, what is refused, and a load by one process."""

from __future__ import annotations

import inspect
import pathlib

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import format_utils as stock
from torch.distributed.checkpoint.metadata import Metadata

from ckptd.checkpoint.formats.broadcast import BroadcastingTorchSaveReader, DynamicMetaLoadPlanner
from ckptd.checkpoint.formats.torch_save import dcp_to_torch_save, torch_save_to_dcp
from ckptd.protocol.errors import BadFile, Mismatch, MissingKeys, SystemCallFailed, Unsupported

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (BroadcastingTorchSaveReader, stock.BroadcastingTorchSaveReader),
        (DynamicMetaLoadPlanner, stock.DynamicMetaLoadPlanner),
        (DynamicMetaLoadPlanner.set_up_planner, stock.DynamicMetaLoadPlanner.set_up_planner),
        (BroadcastingTorchSaveReader.reset, stock.BroadcastingTorchSaveReader.reset),
        (dcp_to_torch_save, stock.dcp_to_torch_save),
        (torch_save_to_dcp, stock.torch_save_to_dcp),
    ],
)
def test_arguments_are_stocks(ours, theirs):
    def shape(function):
        return [(p.name, p.default, p.kind) for p in inspect.signature(function).parameters.values()]

    assert shape(ours) == shape(theirs)


@pytest.fixture
def path(tmp_path):
    state = {"model": {"w": torch.arange(6.0).reshape(2, 3)}, "step": 3, "h": torch.ones(2, dtype=torch.float16)}
    torch.save(state, tmp_path / "a.pt")
    return str(tmp_path / "a.pt")


def load(state, path, planner=None, **options):
    dcp.load(
        state,
        checkpoint_id=path,
        storage_reader=BroadcastingTorchSaveReader(),
        planner=planner or DynamicMetaLoadPlanner(**options),
        no_dist=True,
    )


def test_one_process_loads_without_a_group(path):
    state = {"model": {"w": torch.zeros(2, 3)}, "h": torch.zeros(2)}
    load(state, path)
    assert torch.equal(state["model"]["w"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(state["h"], torch.ones(2))


def test_stocks_planner_goes_with_our_reader(path):
    state = {"model": {"w": torch.zeros(2, 3)}}
    load(state, path, stock.DynamicMetaLoadPlanner())
    assert torch.equal(state["model"]["w"], torch.arange(6.0).reshape(2, 3))


def test_a_flat_state_dict_is_taken_as_it_is(tmp_path):
    torch.save({"model.w": torch.ones(2)}, tmp_path / "a.pt")
    state = {"model.w": torch.zeros(2)}
    load(state, str(tmp_path / "a.pt"), flatten_state_dict=False)
    assert torch.equal(state["model.w"], torch.ones(2))


@pytest.mark.parametrize(
    ("state", "error", "reason"),
    [
        ({"model": {"v": torch.zeros(1)}}, MissingKeys, r"model\.v"),
        ({"h": torch.zeros(3)}, Mismatch, r"wants shape \(3,\), the checkpoint holds shape \(2,\)"),
        ({"step": torch.zeros(())}, Mismatch, "an object"),
        ({"step": 1}, Unsupported, "no tensor"),
    ],
)
def test_what_does_not_fit_is_named(path, state, error, reason):
    planner = DynamicMetaLoadPlanner()
    reader = BroadcastingTorchSaveReader(path)
    with pytest.raises(error, match=reason):  # without dcp.load, which wraps errors
        planner.set_up_planner(state, reader.read_metadata(), True)
        reader.set_up_storage_reader(Metadata({}), True)
        reader.read_data(planner.create_local_plan(), planner).wait()


@pytest.mark.parametrize(("content", "error"), [(None, SystemCallFailed), (b"garbage", BadFile)])
def test_a_file_that_cannot_be_loaded(tmp_path, content, error):
    if content is not None:
        (tmp_path / "a.pt").write_bytes(content)
    planner, reader = DynamicMetaLoadPlanner(), BroadcastingTorchSaveReader(tmp_path / "a.pt")
    planner.set_up_planner({"w": torch.zeros(1)})
    reader.set_up_storage_reader(Metadata({}), True)
    with pytest.raises(error):
        reader.read_data(planner.create_local_plan(), planner)


def test_a_load_needs_a_file():
    with pytest.raises(Unsupported, match="checkpoint_id"):
        BroadcastingTorchSaveReader().set_up_storage_reader(Metadata({}), True)
    assert not BroadcastingTorchSaveReader.validate_checkpoint_id("/nowhere")
    assert BroadcastingTorchSaveReader.validate_checkpoint_id(pathlib.Path(__file__))
