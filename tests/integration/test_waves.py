"""States that are larger than the arena: the same files as ever, by one rank and by several, read by stock."""

import pytest
import torch
from support.clients import assert_holds, stock_load
from support.nursery import state
from support.states import assert_same, blank, everything
from support.trees import below

from ckptd.checkpoint.indexing.open import read_index

KIB = 1 << 10
MIB = 1 << 20
RING = {"staging": "waves", "slots": 2, "slot_bytes": 256 * KIB}


def files(path):
    return {name.name: name.read_bytes() for name in path.iterdir() if name.name.endswith(".distcp")}


def hashes(path):
    index = read_index(str(path))
    return index.item_hash.tolist(), index.header["frame_hashes"]


def arena_bytes(daemon):
    return sum(path.stat().st_size for path in below(daemon.runtime.arenas, "*.arena"))


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_everything_is_saved_as_ever(daemon, client, tmp_path, slots):
    wanted = everything()
    client.save(wanted, checkpoint_id=tmp_path / "at-once")
    client.connect(**{**RING, "slots": slots})
    client.save(wanted, checkpoint_id=tmp_path / "waves")
    assert files(tmp_path / "waves") == files(tmp_path / "at-once")
    assert hashes(tmp_path / "waves") == hashes(tmp_path / "at-once")
    for load in (
        lambda s: client.load(s, checkpoint_id=tmp_path / "waves"),
        lambda s: stock_load(s, tmp_path / "waves"),
    ):
        found = blank(wanted)
        load(found)
        assert_same(found, wanted)


def test_memory_is_that_of_the_slots_however_large_the_state(daemon, client, tmp_path):
    session = client.connect(state(16), **RING)
    for number in range(3):
        future = client.async_save(state(16, float(number)), checkpoint_id=tmp_path / "a")
        assert future.staging_completion.done()
        future.result(30)
        assert arena_bytes(daemon) == 2 * 256 * KIB + 4096
        assert future.progress.bytes_done == future.progress.bytes_total > 16 * MIB
    assert_holds(tmp_path / "a", mib=16, value=2.0)
    slots = daemon.status()["jobs"][0]["sessions"][0]["slots"]
    assert [slot["state"] for slot in slots] == ["free", "free"]
    assert session.live


def test_saves_that_follow_at_once_share_the_ring_and_keep_their_bytes_apart(daemon, client, tmp_path):
    """A slot is given back once for each wave: the end of a save must not free what the next one stages in."""
    client.connect(state(4), **RING)
    futures = [client.async_save(state(4, float(n)), checkpoint_id=tmp_path / str(n)) for n in range(8)]
    for number, future in enumerate(futures):
        future.result(30)
        assert_holds(tmp_path / str(number), mib=4, value=float(number))


def test_what_fits_into_a_slot_is_staged_at_once_and_waves_may_follow_it(daemon, client, tmp_path):
    client.connect(**RING)
    for mib, name in [(0, "a"), (2, "b"), (0, "c"), (0, "a")]:  # a slot dressed for one is used for the other
        wanted = {"w": torch.full((mib * MIB // 4 + 1000,), float(mib)), "o": name * 300}
        client.save(wanted, checkpoint_id=tmp_path / name)
        found = blank(wanted)
        stock_load(found, tmp_path / name)
        assert_same(found, wanted)


def test_waves_may_be_staged_beside_the_trainer(daemon, client, tmp_path):
    client.connect(**RING)
    stager = client.DefaultStager(client.StagingOptions(False, False, True, False))
    try:
        future = client.async_save(state(8, 2.0), checkpoint_id=tmp_path / "a", async_stager=stager)
        future.result(30)
    finally:
        stager.close()
    assert_holds(tmp_path / "a", mib=8, value=2.0)


def test_a_hand_over_that_fits_no_slot_is_refused_with_the_numbers(daemon, client, tmp_path):
    client.connect(**RING)

    class Mine(client.DefaultSavePlanner):
        pass

    future = client.async_save(state(4), checkpoint_id=tmp_path / "a", planner=Mine())
    assert future.exception(30).code == "slot_too_small"
    client.save(state(4), checkpoint_id=tmp_path / "a")
    assert_holds(tmp_path / "a", mib=4)


def test_a_ring_whose_slots_hold_no_page_beside_the_seal_is_refused(daemon, client, tmp_path):
    client.connect(staging="waves", slot_bytes=8 * KIB)
    future = client.async_save(state(4), checkpoint_id=tmp_path / "a")
    assert future.exception(30).code == "slot_too_small"


RANKS = """
generator = torch.Generator().manual_seed(rank)
state = {
    "replicated": {f"w{n}": torch.full((70_000,), float(n)) for n in range(8)},
    f"only-{rank}": torch.randn(300, 1001, generator=generator).t(),
    "step": 5,
    f"rng-{rank}": list(range(rank, 400)),
}
"""


@pytest.mark.parametrize("in_waves", [(True, True), (True, False)])
def test_ranks_save_together_some_in_waves(daemon, trainers, tmp_path, in_waves):
    ranks = trainers.job(2)
    ranks.do(RANKS)
    ranks.do("dcp.save(state, checkpoint_id=path)", path=str(tmp_path / "at-once"))
    ranks.do("dcp.connect(job='waves', rank=rank, world_size=2, **(options if rank in those else {}))",
             options=RING, those=[rank for rank in (0, 1) if in_waves[rank]])  # fmt: skip
    for _ in range(2):
        ranks.do("future = dcp.async_save(state, checkpoint_id=path)", path=str(tmp_path / "waves"))
        assert ranks.get("outcome(future)") == ["committed"] * 2
    assert files(tmp_path / "waves") == files(tmp_path / "at-once")
    assert hashes(tmp_path / "waves") == hashes(tmp_path / "at-once")
    found = {"replicated": {f"w{n}": torch.zeros(70_000) for n in range(8)}, "only-1": torch.zeros(1001, 300)}
    stock_load(found, tmp_path / "waves")
    assert torch.equal(found["only-1"], torch.randn(300, 1001, generator=torch.Generator().manual_seed(1)).t())
    assert all(bool((found["replicated"][f"w{n}"] == n).all()) for n in range(8))


def test_a_rank_with_a_new_structure_is_planned_beside_one_that_has_staged_in_waves(daemon, trainers, tmp_path):
    ranks = trainers.job(2, **RING)
    ranks.do(RANKS)
    ranks.do("dcp.save(state, checkpoint_id=path)", path=str(tmp_path / "before"))
    ranks[1].do("state['new'] = torch.arange(200_000.0)")
    ranks.do("future = dcp.async_save(state, checkpoint_id=path)", path=str(tmp_path / "after"))
    assert ranks.get("outcome(future)") == ["committed"] * 2
    found = {"new": torch.zeros(200_000), "only-0": torch.zeros(1001, 300)}
    stock_load(found, tmp_path / "after")
    assert torch.equal(found["new"], torch.arange(200_000.0))
    assert torch.equal(found["only-0"], torch.randn(300, 1001, generator=torch.Generator().manual_seed(0)).t())
