"""DCP's save protocol, played for all ranks by one process."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.distributed.checkpoint as stock
from support.clients import stock_load
from support.writers import Doubling, Failing, PickleWriter, read_back
from torch.distributed.checkpoint.api import CheckpointException

from ckptd.checkpoint.user_code.handover import UserSave
from ckptd.checkpoint.user_code.savers import save_all
from ckptd.protocol.errors import UserCodeFailed

CALLS = ["reset", "set_up_storage_writer", "prepare_local_plan", "prepare_global_plan", "write_data", "finish"]


def rank_of(path, state_dict, planner=None, **options) -> UserSave:
    return UserSave(str(path), planner or stock.DefaultSavePlanner(), PickleWriter("elsewhere", **options), state_dict)


def test_the_calls_come_in_dcps_order(tmp_path):
    save_all([rank_of(tmp_path / "a", {"w": torch.ones(2), "n": 1})])
    names, calls, ranks = pickle.loads((tmp_path / "a" / "finished.pickle").read_bytes())
    assert (names, calls, ranks) == (["n", "w"], CALLS, 1)


def test_the_metadata_is_what_stock_would_have_made(tmp_path):
    state = {"w": torch.ones(2, 3), "nested": {"n": 1}}
    ours = save_all([UserSave(str(tmp_path / "a"), stock.DefaultSavePlanner(), stock.FileSystemWriter("x"), state)])
    found = {"w": torch.zeros(2, 3), "nested": {"n": 0}}
    stock_load(found, tmp_path / "a")
    assert torch.equal(found["w"], state["w"])
    assert set(ours.state_dict_metadata) == {"w", "nested.n"}


def test_several_ranks_share_their_replicas(tmp_path):
    saves = [rank_of(tmp_path / "a", {"all": torch.ones(2), f"only-{rank}": torch.full((1,), rank)}) for rank in (0, 1)]
    save_all(saves)
    assert {key for key, _ in read_back(tmp_path / "a")} == {"all", "only-0", "only-1"}
    both = [pickle.loads(path.read_bytes()) for path in sorted((tmp_path / "a").glob("rank-*"))]
    assert sum(("all", (0,)) in found for found in both) == 1


def test_a_users_planner_transforms_what_is_written(tmp_path):
    save_all([rank_of(tmp_path / "a", {"w": torch.ones(2)}, Doubling())])
    assert read_back(tmp_path / "a")["w", (0,)].tolist() == [2, 2]


def test_progress_counts_the_items_that_the_writer_asks_for(tmp_path):
    seen = []
    save_all([rank_of(tmp_path / "a", {"a": torch.ones(1), "b": torch.ones(1), "c": 3})], on_item=seen.append)
    assert seen == [1, 2, 3]


@pytest.mark.parametrize(
    "call", ["set_up_planner", "create_local_plan", "create_global_plan", "finish_plan", "resolve_data"]
)
def test_a_planner_that_fails_is_named_with_its_rank_and_call(tmp_path, call):
    rank = 0 if call == "create_global_plan" else 1
    planners = [Failing(call) if n == rank else stock.DefaultSavePlanner() for n in (0, 1)]
    saves = [rank_of(tmp_path / "a", {f"w{n}": torch.ones(1)}, planner) for n, planner in enumerate(planners)]
    with pytest.raises((UserCodeFailed, ValueError), match=f"no {call} today"):
        save_all(saves)
    assert not (tmp_path / "a" / "finished.pickle").exists()


def test_a_writer_that_fails_is_named_with_its_rank_and_call(tmp_path):
    saves = [rank_of(tmp_path / "a", {f"w{n}": torch.ones(1)}, fail_on_rank=1) for n in (0, 1)]
    with pytest.raises(UserCodeFailed, match=r"rank 1: PickleWriter\.write_data failed: OSError.*No space left"):
        save_all(saves)


def test_torchs_own_exception_does_not_escape(tmp_path):
    class Throws(stock.DefaultSavePlanner):
        def create_local_plan(self):
            raise CheckpointException("collective", {})

    with pytest.raises(UserCodeFailed, match="CheckpointException"):
        save_all([rank_of(tmp_path / "a", {}, Throws())])


def test_a_writer_from_before_keyword_arguments_works(tmp_path):
    class Old(PickleWriter):
        def set_up_storage_writer(self, is_coordinator):
            super().set_up_storage_writer(is_coordinator, rank=0)

    save_all([UserSave(str(tmp_path / "a"), stock.DefaultSavePlanner(), Old("x"), {"w": torch.ones(1)})])
    assert ("w", (0,)) in read_back(tmp_path / "a")
