"""A user's own planner or storage writer does the save in a worker, on what was staged."""

import pickle
import threading
import uuid
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as stock
from support.clients import stock_load
from support.objectstore import KEYS, Bucket, s3_server
from support.waiting import PATIENCE_S, wait_until
from support.writers import Doubling, Failing, Lethal, PickleWriter, read_back

TESTS = str(Path(__file__).parents[1])
WRITERS = (
    "import sys\nsys.path.insert(0, tests)\nfrom support.writers import *\nimport torch.distributed.checkpoint as stock"
)


def state():
    return {"w": torch.arange(6.0), "nested": {"b": torch.ones(2, dtype=torch.bfloat16), "n": 7}}


def test_a_users_planner_works_on_what_was_staged(daemon, client, tmp_path):
    saved = state()
    future = client.async_save(saved, checkpoint_id=tmp_path / "a", planner=Doubling())
    saved["w"].zero_()  # staged is staged
    metadata = future.result(60)
    assert set(metadata.state_dict_metadata) == {"w", "nested.b", "nested.n"}
    found = {"w": torch.zeros(6), "nested": {"b": torch.zeros(2, dtype=torch.bfloat16), "n": 0}}
    stock_load(found, tmp_path / "a")
    assert torch.equal(found["w"], torch.arange(6.0) * 2)
    assert (found["nested"]["b"].tolist(), found["nested"]["n"]) == ([2.0, 2.0], 7)


@pytest.mark.parametrize("save", ["save", "async_save"])
def test_a_users_storage_writer_writes_as_it_likes(daemon, client, tmp_path, save):
    made = getattr(client, save)(state(), storage_writer=PickleWriter(tmp_path / "a"))
    metadata = made if save == "save" else made.result(60)
    assert isinstance(metadata, stock.Metadata)
    found = read_back(tmp_path / "a")
    assert torch.equal(found["w", (0,)], torch.arange(6.0))
    assert ("nested.n", ()) in found
    assert pickle.loads((tmp_path / "a" / "finished.pickle").read_bytes())[1][-1] == "finish"


def test_steady_saves_reuse_slots_and_worker(daemon, client, tmp_path):
    session = client.connect()
    for step in range(5):
        saved = {"w": torch.full((1 << 16,), float(step)), "step": step}
        client.async_save(saved, checkpoint_id=tmp_path / str(step), storage_writer=PickleWriter("x")).result(60)
    assert all(read_back(tmp_path / str(n))["w", (0,)][0] == n for n in range(5))
    [job] = daemon.status()["jobs"]
    assert [g["state"] for g in job["generations"]] == ["committed"] * 5
    assert session.live


def test_the_two_ways_to_save_take_turns(daemon, client, tmp_path):
    for step in range(4):
        writer = PickleWriter(tmp_path / str(step)) if step % 2 else None
        client.save({"w": torch.full((9,), float(step))}, checkpoint_id=tmp_path / str(step), storage_writer=writer)
    found = {"w": torch.zeros(9)}
    client.load(found, checkpoint_id=tmp_path / "2")
    assert found["w"].tolist() == [2.0] * 9
    assert read_back(tmp_path / "3")["w", (0,)][0] == 3


def test_relative_paths_are_the_trainers(daemon, client, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    client.save({"w": torch.ones(1)}, storage_writer=PickleWriter("here"))
    assert ("w", (0,)) in read_back(tmp_path / "here")


def test_an_error_in_the_users_code_reaches_the_future_with_its_place(daemon, client, tmp_path):
    future = client.async_save(state(), checkpoint_id=tmp_path / "a", planner=Failing("create_local_plan"))
    assert "Failing.create_local_plan failed: ValueError: no create_local_plan today" in str(future.exception(60))
    full = client.async_save(state(), storage_writer=PickleWriter(tmp_path / "b", fail_on_rank=0))
    assert "No space left on device" in str(full.exception(60))
    client.save(state(), checkpoint_id=tmp_path / "c")  # and the next save works


def test_what_cannot_be_pickled_fails_before_anything_is_written(daemon, client, tmp_path):
    writer = PickleWriter(tmp_path / "a")
    writer.lock = threading.Lock()
    assert "cannot be pickled" in str(client.async_save(state(), storage_writer=writer).exception(60))
    assert not (tmp_path / "a").exists()


def test_work_of_a_worker_that_dies_is_done_again(daemon, client, tmp_path):
    (tmp_path / "marks").mkdir()
    planner = Lethal(tmp_path / "marks", survive_from=1)
    client.async_save(state(), checkpoint_id=tmp_path / "a", planner=planner).result(60)
    assert len(list((tmp_path / "marks").iterdir())) == 2
    assert (tmp_path / "a" / ".metadata").exists()


def test_code_that_kills_every_worker_fails_the_save_and_no_more(daemon, client, tmp_path):
    (tmp_path / "marks").mkdir()
    planner = Lethal(tmp_path / "marks", survive_from=99)
    assert (
        "WorkerDied"
        in type(client.async_save(state(), checkpoint_id=tmp_path / "a", planner=planner).exception(60)).__name__
    )
    assert not (tmp_path / "a").exists()
    client.save(state(), checkpoint_id=tmp_path / "b")


RANKS = "saved = {'all': torch.ones(4), f'only-{rank}': torch.full((3,), float(rank)), 'step': 3}"


def test_ranks_hand_over_together(daemon, trainers, tmp_path):
    ranks = trainers.job(4)
    ranks.do(WRITERS, tests=TESTS)
    ranks.do(RANKS)
    ranks.do(
        "future = dcp.async_save(saved, checkpoint_id=path, storage_writer=PickleWriter('x'))", path=str(tmp_path / "a")
    )
    assert ranks.get("outcome(future, 60)") == ["committed"] * 4
    found = read_back(tmp_path / "a")
    assert {key for key, _ in found} == {"all", "step", "only-0", "only-1", "only-2", "only-3"}
    assert found["only-2", (0,)].tolist() == [2.0] * 3
    assert len(list((tmp_path / "a").glob("rank-*"))) == 4


def test_shards_reach_the_users_writer_as_shards(daemon, trainers, tmp_path):
    ranks = trainers.job(2)
    ranks.do(WRITERS, tests=TESTS)
    gloo = "dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=world_size)"
    ranks.do(gloo, store=str(tmp_path / "store"))
    ranks.do("full = torch.arange(10.).reshape(5, 2)")
    ranks.do("saved = {'s': distribute_tensor(full, init_device_mesh('cpu', (2,)), [Shard(0)])}")
    ranks.do("dcp.save(saved, checkpoint_id=path, planner=Doubling())", path=str(tmp_path / "a"))
    ranks.do("dist.destroy_process_group()")
    found = {"s": torch.zeros(5, 2)}
    stock_load(found, tmp_path / "a")
    assert torch.equal(found["s"], torch.arange(10.0).reshape(5, 2) * 2)


def test_one_rank_that_fails_fails_all_alike(daemon, trainers, tmp_path):
    ranks = trainers.job(2)
    ranks.do(WRITERS, tests=TESTS)
    ranks.do(RANKS)
    save = "future = dcp.async_save(saved, storage_writer=PickleWriter(path, fail_on_rank=1))"
    ranks.do(save, path=str(tmp_path / "a"))
    outcomes = ranks.get("outcome(future, 60)")
    assert len(set(outcomes)) == 1
    assert "rank 1: PickleWriter.write_data failed" in outcomes[0]


def test_ranks_that_disagree_about_the_writer_are_told(daemon, trainers, tmp_path):
    ranks = trainers.job(2)
    ranks.do(WRITERS, tests=TESTS)
    ranks.do(RANKS)
    save = "future = dcp.async_save(saved, checkpoint_id=path, storage_writer=PickleWriter('x') if rank else None)"
    ranks.do(save, path=str(tmp_path / "a"))
    outcomes = ranks.get("outcome(future, 60)")
    assert len(set(outcomes)) == 1
    assert "all ranks must make the same calls" in outcomes[0]


def test_the_trainer_may_die_once_it_has_handed_over(daemon, trainers, tmp_path):
    trainer = trainers.start()
    trainer.do(WRITERS, tests=TESTS)
    trainer.do("future = dcp.async_save(state(1), storage_writer=PickleWriter(path))", path=str(tmp_path / "a"))
    trainer.kill()
    wait_until((tmp_path / "a" / "finished.pickle").exists, "the save is finished", timeout_s=3 * PATIENCE_S)
    assert read_back(tmp_path / "a")["model.w", (0,)].shape == (1 << 18,)


def test_a_daemon_that_runs_no_users_code_says_so_before_anything_is_staged(start_daemon, trainers, tmp_path):
    start_daemon(user_code=False)
    trainer = trainers.start()
    trainer.do(WRITERS, tests=TESTS)
    trainer.do("future = dcp.async_save(state(1), storage_writer=PickleWriter(path))", path=str(tmp_path / "a"))
    told = trainer.get("outcome(future, 60)")
    assert "PickleWriter in a daemon that runs no users' code" in told
    assert "user_code = true" in told
    trainer.do("dcp.save(state(1), checkpoint_id=path)", path=str(tmp_path / "b"))


def test_the_daemon_itself_never_loads_torch(daemon, client, tmp_path):
    client.save(state(), storage_writer=PickleWriter(tmp_path / "a"))
    assert "libtorch" not in Path(f"/proc/{daemon.pid}/maps").read_text()


class TestObjectStores:
    """An id that is a URL is written by a worker; the trainer's environment says how to get there, not the daemon's."""

    @pytest.fixture
    def bucket(self, daemon, monkeypatch):
        import s3fs

        with s3_server() as address:
            for name, value in {**KEYS, "AWS_ENDPOINT_URL": address}.items():
                monkeypatch.setenv(name, value)
            s3fs.S3FileSystem.clear_instance_cache()
            fs = s3fs.S3FileSystem()
            name = f"b-{uuid.uuid4().hex}"
            fs.call_s3("create_bucket", Bucket=name)
            yield Bucket(fs, name)
            s3fs.S3FileSystem.clear_instance_cache()

    def test_a_checkpoint_goes_to_a_store_and_comes_back(self, bucket, client):
        future = client.async_save(state(), checkpoint_id=f"{bucket.url}/run//7")
        assert set(future.result(60).state_dict_metadata) == {"w", "nested.b", "nested.n"}
        assert "run//7/.metadata" in bucket.objects()
        found = {"w": torch.zeros(6), "nested": {"b": torch.zeros(2, dtype=torch.bfloat16), "n": 0}}
        client.load(found, checkpoint_id=f"{bucket.url}/run//7")
        assert torch.equal(found["w"], torch.arange(6.0))
        assert found["nested"]["n"] == 7

    def test_a_save_that_fails_leaves_nothing_there(self, bucket, client):
        future = client.async_save(state(), checkpoint_id=f"{bucket.url}/run/7", planner=Failing("finish_plan"))
        assert "no finish_plan today" in str(future.exception(60))
        assert bucket.objects() == []
        gone = client.async_save(state(), checkpoint_id="s3://no-such-bucket/7")
        assert "no-such-bucket" in str(gone.exception(60))
