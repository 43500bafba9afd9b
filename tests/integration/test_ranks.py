"""Jobs of several ranks on one node: replicas once, shards where they lie, all or nothing, no collective."""

import pytest
import torch
from support.clients import assert_holds, stock_load, stock_metadata
from support.trainers import Ranks

GLOO = "dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=world_size)"
KIB = 1 << 10


def group(trainers, count, tmp_path, name="store"):
    """Return trainers that have a gloo group."""
    ranks = Ranks(trainers.start() for _ in range(count))
    ranks.do(GLOO, store=str(tmp_path / name))
    return ranks


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_ranks_told_by_arguments_save_their_replicas_once(daemon, trainers, tmp_path, count):
    ranks = trainers.job(count)
    ranks.do("future = dcp.async_save(state(2), checkpoint_id=path)", path=str(tmp_path / "a"))
    assert ranks.get("outcome(future)") == ["committed"] * count
    sizes = [path.stat().st_size for path in (tmp_path / "a").glob("*.distcp")]
    assert sum(sizes) < 2 * 1024 * KIB + count * 64 * KIB
    progress = ranks.get("(future.progress.bytes_done, future.progress.bytes_total)")
    assert len(set(progress)) == 1
    assert progress[0][0] == progress[0][1]
    assert_holds(tmp_path / "a", mib=2)


def test_replicas_are_balanced_over_the_ranks_by_bytes(daemon, trainers, tmp_path):
    ranks = trainers.job(4)
    ranks.do("state = {f'w{n}': torch.full(((n % 4 + 1) << 17,), float(n)) for n in range(16)}")
    ranks.do("dcp.save(state, checkpoint_id=path)", path=str(tmp_path / "a"))
    sizes = [(tmp_path / "a" / f"__{rank}_0.distcp").stat().st_size for rank in range(4)]
    total = sum((n % 4 + 1) << 19 for n in range(16))
    assert total <= sum(sizes) < total + 16 * 16 * KIB
    assert max(sizes) - min(sizes) <= 4 << 19
    found = {f"w{n}": torch.zeros((n % 4 + 1) << 17) for n in range(16)}
    stock_load(found, tmp_path / "a")
    assert all(bool((found[f"w{n}"] == n).all()) for n in range(16))


def test_what_is_on_one_rank_only_is_saved_there(daemon, trainers, tmp_path):
    ranks = trainers.job(2)
    ranks.do("state = {'all': torch.ones(3), f'only-{rank}': torch.full((5,), float(rank)), f'rng-{rank}': rank}")
    ranks.do("dcp.save(state, checkpoint_id=path)", path=str(tmp_path / "a"))
    found = {"all": torch.zeros(3), "only-0": torch.ones(5), "only-1": torch.zeros(5), "rng-0": None, "rng-1": None}
    stock_load(found, tmp_path / "a")
    assert (found["only-0"].tolist(), found["only-1"].tolist()) == ([0.0] * 5, [1.0] * 5)
    assert (found["rng-0"], found["rng-1"]) == (0, 1)


SHARDED = """
mesh = init_device_mesh("cpu", (world_size,))
full = torch.arange(7 * 40 * 3.0).reshape(7 * 40, 3)
uneven = torch.arange(10.0)
weights = torch.arange(1 << 16).float()
state = {
    "shard": distribute_tensor(full, mesh, [Shard(0)]),
    "columns": distribute_tensor(full.t().contiguous(), mesh, [Shard(1)]),
    "uneven": distribute_tensor(uneven, mesh, [Shard(0)]),
    "replicated": distribute_tensor(weights, mesh, [Replicate()]),
    "plain": weights.clone(),
    "step": 5,
}
"""
BLANK = """
mesh = init_device_mesh("cpu", (world_size,))
state = {
    "shard": distribute_tensor(torch.zeros(7 * 40, 3), mesh, [Shard(0)]),
    "columns": distribute_tensor(torch.zeros(3, 7 * 40), mesh, [placement]),
    "uneven": distribute_tensor(torch.zeros(10), mesh, [Shard(0)]),
    "replicated": torch.zeros(1 << 16),
    "plain": distribute_tensor(torch.zeros(1 << 16), mesh, [Shard(0)]),
    "step": 0,
}
"""


def whole():
    full = torch.arange(7 * 40 * 3.0).reshape(7 * 40, 3)
    weights = torch.arange(1 << 16).float()
    return {
        "shard": full,
        "columns": full.t().contiguous(),
        "uneven": torch.arange(10.0),
        "replicated": weights,
        "plain": weights,
        "step": 5,
    }


def zeros():
    return {key: torch.zeros_like(value) if key != "step" else 0 for key, value in whole().items()}


def test_shards_of_four_ranks_load_on_one_on_two_and_through_stock(daemon, trainers, client, tmp_path):
    target = tmp_path / "a"
    four = group(trainers, 4, tmp_path)
    four.do(SHARDED)
    four.do("session = dcp.connect()\nforbid_collectives()")
    four.do("future = dcp.async_save(state, checkpoint_id=path)", path=str(target))
    assert four.get("outcome(future)") == ["committed"] * 4
    shards = stock_metadata(target).state_dict_metadata["shard"].chunks
    assert sorted(tuple(chunk.sizes) for chunk in shards) == [(70, 3)] * 4
    total = sum(path.stat().st_size for path in target.glob("*.distcp"))
    once = sum(value.nbytes for value in whole().values() if isinstance(value, torch.Tensor))
    assert total < once + 4 * 64 * KIB  # replicas are there once
    for load in (lambda into: client.load(into, checkpoint_id=target), lambda into: stock_load(into, target)):
        found = zeros()
        load(found)
        assert all(torch.equal(found[key], value) for key, value in whole().items() if key != "step")
        assert found["step"] == 5
    two = group(trainers, 2, tmp_path, "other-store")
    two.do("placement = Shard(0)\n" + BLANK)  # rows where columns were
    two.do("dcp.load(state, checkpoint_id=path)", path=str(target))
    gathered = two.get("{k: v.full_tensor().numpy() if hasattr(v, 'full_tensor') else v for k, v in state.items()}")
    for found in gathered:
        for key, value in whole().items():
            assert torch.equal(torch.as_tensor(found[key]), torch.as_tensor(value)), key


def test_a_group_is_asked_for_its_store_and_for_nothing_else(daemon, trainers, tmp_path):
    """The group is gone after connect(): saves go on, so no collective can have run."""
    ranks = group(trainers, 2, tmp_path)
    ranks.do("session = dcp.connect()\ndist.destroy_process_group()")
    for number in (1.0, 2.0):
        ranks.do(
            "future = dcp.async_save(state(value=value), checkpoint_id=path)", value=number, path=str(tmp_path / "a")
        )
        assert ranks.get("outcome(future)") == ["committed"] * 2
    assert_holds(tmp_path / "a", value=2.0)


def test_a_group_without_any_working_collective_is_enough(daemon, trainers, tmp_path):
    """The fake backend's collectives move nothing, as if the only backend had no CPU transport."""
    ranks = Ranks(trainers.start() for _ in range(2))
    ranks.do(
        "import torch.testing._internal.distributed.fake_pg\n"
        "dist.init_process_group('fake', store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)",
        store=str(tmp_path / "store"),
    )
    ranks.do("future = dcp.async_save(state(), checkpoint_id=path)", path=str(tmp_path / "a"))
    assert ranks.get("outcome(future)") == ["committed"] * 2
    assert_holds(tmp_path / "a")


def test_subgroups_save_independently_of_each_other(daemon, trainers, tmp_path):
    ranks = group(trainers, 4, tmp_path)
    ranks.do("pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]\nmine = pairs[rank // 2]")
    ranks.do(
        "future = dcp.async_save(state(value=rank // 2), checkpoint_id=f'{path}-{rank // 2}', process_group=mine)",
        path=str(tmp_path / "pair"),
    )
    assert ranks.get("outcome(future)") == ["committed"] * 4
    assert_holds(tmp_path / "pair-0", value=0.0)
    assert_holds(tmp_path / "pair-1", value=1.0)


def test_no_dist_lets_one_rank_save_alone(daemon, trainers, tmp_path):
    ranks = group(trainers, 2, tmp_path)
    ranks[1].do("dcp.save(state(value=3.0), checkpoint_id=path, no_dist=True)", path=str(tmp_path / "a"))
    assert_holds(tmp_path / "a", value=3.0)


def test_different_values_under_one_key_are_refused_with_the_key(daemon, trainers, tmp_path):
    ranks = trainers.job(2)
    ranks.do("future = dcp.async_save({'w': torch.ones(3 + rank)}, checkpoint_id=path)", path=str(tmp_path / "a"))
    errors = ranks.get("outcome(future)")
    assert errors[0] == errors[1]
    assert "w" in errors[0]
    assert list(tmp_path.iterdir()) == []
