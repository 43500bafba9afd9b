"""Our planners under torch's own `save` and `load`, in a real process group; and subclasses of them under ours."""

import pytest
import torch
from support.clients import stock_load
from support.planners import Halving, Tripling
from support.trainers import Ranks

GROUP = """
import warnings
import torch.distributed.checkpoint as stock
warnings.simplefilter("ignore")
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
mesh = init_device_mesh("cpu", (world_size,))


def made(scale):
    full = torch.arange(70.0).reshape(10, 7) * scale
    return {
        "model": {"w": distribute_tensor(full, mesh, [Shard(0)]), "b": torch.full((5,), float(scale))},
        "step": scale,
        f"of rank {rank}": torch.full((3,), float(rank)),
    }
"""
SAVE = """
for step in range(1, 4):
    planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
    stock.save(made(step), checkpoint_id=f"{root}/{step}", planner=planner)
short = not planner._offer.sent.items
"""
LOAD = """
state = made(-1)
stock.load(state, checkpoint_id=f"{root}/3", planner=dcp.DefaultLoadPlanner())
local = state["model"]["w"].to_local()
"""
FAIL = """
class Broken(dcp.DefaultSavePlanner):
    def create_local_plan(self):
        if rank == 1:
            raise OSError(28, "no space left")
        return super().create_local_plan()


caught = None
try:
    stock.save(made(1), checkpoint_id=f"{root}/broken", planner=Broken())
except stock.CheckpointException as error:
    caught = sorted(error.failures)
"""


@pytest.fixture
def group(trainers, tmp_path):
    """Three ranks with a process group."""
    ranks = Ranks(trainers.start() for _ in range(3))
    ranks.do(GROUP, store=str(tmp_path / "store"), root=str(tmp_path))
    return ranks


def test_torchs_save_and_load_run_with_our_planners_cached_plans_included(group, tmp_path):
    group.do(SAVE)
    assert group.get("short") == [True] * 3  # the third save sent names only
    for step in (1, 3):
        found = {"model": {"w": torch.zeros(10, 7), "b": torch.zeros(5)}, "step": None, "of rank 2": torch.zeros(3)}
        stock_load(found, tmp_path / str(step))
        assert torch.equal(found["model"]["w"], torch.arange(70.0).reshape(10, 7) * step)
        assert found["model"]["b"].tolist() == [float(step)] * 5
        assert found["step"] == step
        assert found["of rank 2"].tolist() == [2.0] * 3
    group.do(LOAD)
    assert [rows for rows, _ in group.get("tuple(local.shape)")] == [4, 4, 2]
    assert torch.equal(torch.cat(group.get("local")), torch.arange(70.0).reshape(10, 7) * 3)
    assert group.get("state['step']") == [3] * 3


def test_a_rank_that_cannot_plan_fails_the_save_on_all_ranks_and_the_next_one_succeeds(group, tmp_path):
    group.do(FAIL)
    assert group.get("caught") == [[1]] * 3
    group.do(SAVE)
    assert (tmp_path / "3" / ".metadata").exists()


def test_subclasses_of_our_planners_run_under_our_save_and_load(daemon, client, tmp_path):
    for step in range(1, 4):
        state = {"model": {"w": torch.arange(6.0) * step}, "step": step}
        metadata = client.save(state, checkpoint_id=tmp_path / str(step), planner=Tripling(enable_plan_caching=True))
        assert set(metadata.state_dict_metadata) == {"model.w", "step"}
        found = {"model": {"w": torch.zeros(6)}, "step": None}
        client.load(found, checkpoint_id=tmp_path / str(step), planner=Halving())
        assert torch.equal(found["model"]["w"], torch.arange(6.0) * step * 1.5)
        assert found["step"] == step
