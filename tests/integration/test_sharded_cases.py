"""What sharded jobs run into besides: what is refused, what is kept once, what only some ranks hold."""

import re

import pytest
import torch
from support.clients import stock_load
from support.sharded_worlds import worlds
from support.trainers import TrainerRaised

from ckptd import client


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The worlds."""
    with worlds(tmp_path_factory.mktemp("cases")) as shared:
        shared.of_size(2).do(PRELUDE)
        yield shared


PRELUDE = """
from support.layouts import Boxes, mesh_of
from support.sharded_training import Job, KINDS, FULL, get_state_dict, set_state_dict, get_model_state_dict
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor.placement_types import _StridedShard
import torch.distributed.checkpoint as stock
mesh = mesh_of(world_size)
"""
SAVE = "future = dcp.async_save(state, checkpoint_id=path)"


def save(ranks, path, *, lines=""):
    """Save ``state`` of all ranks, made by ``lines``, and return how it ended on each."""
    ranks.do(f"{lines}\n{SAVE}", path=str(path))
    return ranks.get("outcome(future)")


class TestRefused:
    @pytest.mark.parametrize(
        ("lines", "told"),
        [
            (
                "state = {'model': {'w': DTensor.from_local(torch.ones(4), mesh, [Partial()], run_check=False)}}",
                "model.w: a DTensor with a partial placement",
            ),
            (
                "state = {'e': Boxes((3, 2), [((rank, 0), torch.ones(1, 2))])}",
                "e: a gap: the ranks hold 4 of 6 elements",
            ),
            ("state = {'e': Boxes((4, 2), [((rank, 0), torch.ones(2, 2))])}", "e: chunks overlap"),
            ("state = {'e': Boxes((4, 2), [((2 * rank, 0), torch.ones(3, 2))])}", "e: a chunk reaches outside"),
            (
                "state = {'e': Boxes((2, 2), [((0, 0), torch.ones(1 + rank, 2))])}",
                "e: ranks 0 and 1 hold chunks of different size at the same offset",
            ),
            ("state = {'w': torch.ones(3 + rank)}", r"w: rank 1 holds float32\[4\], a lower rank holds float32\[3\]"),
            (
                "state = {'w': torch.ones(3, dtype=[torch.float32, torch.int32][rank])}",
                r"w: rank 1 holds int32\[3\], a lower rank holds float32\[3\]",
            ),
            ("state = {'w': [torch.ones(3), 'text'][rank]}", r"w: rank 1 holds an object, a lower rank holds float32"),
        ],
        ids=["partial", "gap", "overlap", "outside", "sizes", "shapes", "dtypes", "kinds"],
    )
    def test_on_all_ranks_alike_and_by_key(self, shared, tmp_path, lines, told):
        first, second = save(shared.of_size(2), tmp_path / "a", lines=lines)
        assert first == second
        assert re.search(told, first), first
        assert list(tmp_path.iterdir()) == []

    def test_and_the_next_save_is_none_the_worse(self, shared, tmp_path):
        ranks = shared.of_size(2)
        save(ranks, tmp_path / "a", lines="state = {'w': torch.ones(3 + rank)}")
        assert save(ranks, tmp_path / "a", lines="state = {'w': torch.ones(3)}") == ["committed"] * 2


def test_replicas_that_differ_in_their_values_alone_are_not_told_apart(shared, tmp_path):
    """Only one rank stages a replica, so nobody could compare; a key of its own per rank keeps both."""
    lines = "state = {'w': torch.full((3,), float(rank)), f'rng.{rank}': torch.full((3,), float(rank))}"
    assert save(shared.of_size(2), tmp_path / "a", lines=lines) == ["committed"] * 2
    found = {"w": torch.ones(3) * 9, "rng.0": torch.ones(3), "rng.1": torch.zeros(3)}
    stock_load(found, tmp_path / "a")
    assert found["w"].tolist() in ([0.0] * 3, [1.0] * 3)
    assert (found["rng.0"].tolist(), found["rng.1"].tolist()) == ([0.0] * 3, [1.0] * 3)


def test_a_scattered_strided_shard_is_saved_where_it_lies(shared, tmp_path):
    """Rows 0, 1, 4, 5 on one rank and 2, 3, 6, 7 on the other; torch itself tells where the first run lies only."""
    ranks = shared.of_size(2)
    lines = (
        "rows = torch.arange(8.0).reshape(2, 2, 2)[:, rank].reshape(-1, 1).repeat(1, 3)\n"
        "make = lambda local: DTensor.from_local(local, mesh, [_StridedShard(0, split_factor=2)], run_check=False)\n"
        "state = {'w': make(rows.clone())}"
    )
    assert save(ranks, tmp_path / "a", lines=lines) == ["committed"] * 2
    for load in (
        lambda state: client.load(state, checkpoint_id=tmp_path / "a"),
        lambda s: stock_load(s, tmp_path / "a"),
    ):
        found = {"w": torch.zeros(8, 3)}
        load(found)
        assert found["w"].tolist() == [[float(row)] * 3 for row in range(8)]
    ranks.do("found = {'w': make(torch.zeros(4, 3))}\ndcp.load(found, checkpoint_id=path)", path=str(tmp_path / "a"))
    assert ranks.get("torch.equal(found['w'].to_local(), rows)") == [True, True]


def test_replicated_tensors_are_written_once_and_by_all(shared, tmp_path):
    lines = (
        "state = {f'w{n}': distribute_tensor(torch.full((1 << 14,), float(n)), mesh, [Replicate()]) for n in range(16)}"
    )
    assert save(shared.of_size(2), tmp_path / "a", lines=lines) == ["committed"] * 2
    sizes = [(tmp_path / "a" / f"__{rank}_0.distcp").stat().st_size for rank in range(2)]
    assert sizes[0] == sizes[1]
    assert 16 << 16 <= sum(sizes) < 18 << 16
    found = {f"w{n}": torch.zeros(1 << 14) for n in range(16)}
    stock_load(found, tmp_path / "a")
    assert all(bool((found[f"w{n}"] == n).all()) for n in range(16))


def test_a_full_state_dict_is_saved_by_the_rank_that_has_it(shared, tmp_path):
    """StateDictOptions(full_state_dict=True, cpu_offload=True) leaves all other ranks with nothing."""
    ranks = shared.of_size(2)
    lines = "job = Job('FSDP 2', seed=3)\nstate = {'model': get_model_state_dict(job.model, options=FULL)}"
    assert save(ranks, tmp_path / "a", lines=lines) == ["committed"] * 2
    assert ranks.get("len(state['model'])")[1] == 0
    full = ranks[0].get("{key: value.tolist() for key, value in state['model'].items()}")
    found = {"model": {key: torch.tensor(value) * 0 for key, value in full.items()}}
    client.load(found, checkpoint_id=tmp_path / "a")
    assert {key: value.tolist() for key, value in found["model"].items()} == full
    ranks.do(
        "fresh = Job('FSDP 2', seed=4)\nsharded = {'model': get_model_state_dict(fresh.model)}\n"
        "dcp.load(sharded, checkpoint_id=path)\nagain = get_model_state_dict(fresh.model, options=FULL)",
        path=str(tmp_path / "a"),
    )
    assert ranks[0].get("{key: value.tolist() for key, value in again.items()}") == full


def test_tied_weights_come_back_under_both_names_and_stay_tied(shared, tmp_path):
    ranks = shared.of_size(2)
    ranks.do(
        "def tied(value):\n"
        "    net = torch.nn.ModuleDict({'embed': torch.nn.Embedding(6, 4)})\n"
        "    net['head'] = torch.nn.Linear(4, 6, bias=False)\n"
        "    net.head.weight = net.embed.weight\n"
        "    torch.nn.init.constant_(net.embed.weight, value)\n"
        "    optimizer = torch.optim.SGD(net.parameters(), momentum=0.9, lr=0.1)\n"
        "    return torch.nn.parallel.DistributedDataParallel(net), optimizer\n"
        "def state_of(pair):\n"
        "    model, optimizer = get_state_dict(*pair)\n"
        "    return {'model': model, 'optimizer': optimizer}\n"
        "state = state_of(tied(5.0))"
    )
    assert save(ranks, tmp_path / "a") == ["committed"] * 2
    found = {"model": {"embed.weight": torch.zeros(6, 4), "head.weight": torch.zeros(6, 4)}}
    stock_load(found, tmp_path / "a")
    assert all(bool((value == 5).all()) for value in found["model"].values())
    ranks.do(
        "pair = tied(1.0)\nfound = state_of(pair)\ndcp.load(found, checkpoint_id=path)\n"
        "set_state_dict(*pair, model_state_dict=found['model'], optim_state_dict=found['optimizer'])\n"
        "net = pair[0].module",
        path=str(tmp_path / "a"),
    )
    assert ranks.get("(float(net.head.weight[0, 0]), net.head.weight is net.embed.weight)") == [(5.0, True)] * 2


UNUSED = """
def job(seed):
    torch.manual_seed(seed)
    net = torch.nn.ModuleDict({"used": torch.nn.Linear(4, 4), "unused": torch.nn.Linear(4, 4)})
    optimizer = torch.optim.AdamW(net.parameters())
    return net, optimizer
def state_of(pair):
    model, optimizer = get_state_dict(*pair)
    return {"model": model, "optimizer": optimizer}
pair = job(0)
pair[0].used(torch.ones(1, 4)).sum().backward()
pair[1].step()
state = state_of(pair)
"""


def test_a_job_resumes_whose_optimizer_never_saw_a_parameter(shared, tmp_path):
    """The saved optimizer has no state for it, the fresh one that is loaded into has: stock refuses."""
    ranks = shared.of_size(2)
    assert save(ranks, tmp_path / "a", lines=UNUSED) == ["committed"] * 2
    with pytest.raises(TrainerRaised, match="Missing key"):
        ranks.do("stock.load(state_of(job(1)), checkpoint_id=path)", path=str(tmp_path / "a"))
    ranks.do(
        "fresh = job(1)\nfound = state_of(fresh)\nwanted = sorted(found['optimizer']['state'])\n"
        "dcp.load(found, checkpoint_id=path)\n"
        "set_state_dict(*fresh, model_state_dict=found['model'], optim_state_dict=found['optimizer'])\n"
        "moments = get_state_dict(*fresh)[1]['state']",
        path=str(tmp_path / "a"),
    )
    assert ranks.get("'unused.weight' in wanted and 'unused.weight' not in state['optimizer']['state']") == [True] * 2
    same = "torch.equal(moments['used.weight']['exp_avg'], state['optimizer']['state']['used.weight']['exp_avg'])"
    assert ranks.get(same) == [True] * 2
