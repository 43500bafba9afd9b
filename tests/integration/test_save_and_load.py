"""Whatever a trainer holds comes back equal: through us, through stock, and across the two."""

import pytest
import torch
import torch.distributed.checkpoint as stock
from support.clients import stock_load, stock_metadata, stock_save
from support.states import assert_same, blank, everything
from support.trees import below


class Counter:
    """A Stateful object."""

    def __init__(self, count=0):
        self.count, self.history = count, torch.zeros(3)

    def state_dict(self):
        return {"count": self.count, "history": self.history}

    def load_state_dict(self, state):
        self.count, self.history = state["count"], state["history"]


def test_everything_comes_back_through_us_and_through_stock(daemon, client, tmp_path):
    wanted = everything()
    client.save(wanted, checkpoint_id=tmp_path / "a")
    ours, theirs = blank(wanted), blank(wanted)
    client.load(ours, checkpoint_id=tmp_path / "a")
    assert_same(ours, wanted)
    stock_load(theirs, tmp_path / "a")
    assert_same(theirs, wanted)


def test_what_stock_saved_comes_back_through_us(runtime, client, tmp_path):
    wanted = everything()
    stock_save(wanted, tmp_path / "a")
    found = blank(wanted)
    client.load(found, checkpoint_id=tmp_path / "a")
    assert_same(found, wanted)


def test_our_metadata_says_what_stocks_says(daemon, client, tmp_path):
    wanted = everything()
    ours = client.save(wanted, checkpoint_id=tmp_path / "ours")
    theirs = stock_save(wanted, tmp_path / "stock")
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.planner_data == theirs.planner_data
    read = stock_metadata(tmp_path / "ours")
    assert read.state_dict_metadata == ours.state_dict_metadata
    assert read.planner_data == ours.planner_data
    assert {index.fqn for index in read.storage_data} == {index.fqn for index in theirs.storage_data}


def test_stateful_objects_are_asked_for_their_state_and_given_it_back(daemon, client, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(8, 4)).sum().backward()
    optimizer.step()
    counter = Counter(41)
    client.save({"model": model, "optimizer": optimizer, "counter": counter}, checkpoint_id=tmp_path / "a")
    other = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    other_optimizer = torch.optim.AdamW(other.parameters())
    other(torch.randn(8, 4)).sum().backward()
    other_optimizer.step()
    restored = Counter()
    client.load({"model": other, "optimizer": other_optimizer, "counter": restored}, checkpoint_id=tmp_path / "a")
    assert restored.count == 41
    assert_same(dict(other.state_dict()), dict(model.state_dict()))
    assert_same(other_optimizer.state_dict()["state"], optimizer.state_dict()["state"])


def test_stocks_arguments_are_understood(daemon, client, tmp_path):
    wanted = {"w": torch.arange(10.0), "n": 3}
    client.save(wanted, storage_writer=stock.FileSystemWriter(tmp_path / "a"), no_dist=True)
    client.async_save(
        wanted,
        checkpoint_id=str(tmp_path / "b"),
        storage_writer=stock.FileSystemWriter(tmp_path / "b"),
        planner=stock.DefaultSavePlanner(),
        async_checkpointer_type=client.AsyncCheckpointerType.PROCESS,
    ).result(30)
    for name in ("a", "b"):
        found = {"w": torch.zeros(10), "n": 0}
        client.load(
            found,
            storage_reader=stock.FileSystemReader(tmp_path / name),
            planner=stock.DefaultLoadPlanner(),
            no_dist=True,
        )
        assert_same(found, wanted)


def test_flatten_state_dict_false_is_as_with_stock(daemon, client, tmp_path):
    wanted = {"w": torch.arange(10.0), "nested": {"a": 1, "b": torch.ones(2)}}
    client.save(wanted, checkpoint_id=tmp_path / "a", planner=stock.DefaultSavePlanner(flatten_state_dict=False))
    names = set(stock_metadata(tmp_path / "a").state_dict_metadata)
    assert names == {"w", "nested"}
    found = {"w": torch.zeros(10), "nested": None}
    client.load(found, checkpoint_id=tmp_path / "a", planner=stock.DefaultLoadPlanner(flatten_state_dict=False))
    assert torch.equal(found["nested"]["b"], torch.ones(2))


def test_blocking_staging_keeps_the_values_of_the_call(daemon, client, tmp_path):
    wanted = everything()
    held = everything()
    future = client.async_save(held, checkpoint_id=tmp_path / "a")
    with torch.no_grad():
        held["model"]["deep"]["er"]["w"].fill_(-1)
        held["shared"]["one"].zero_()
        held["zero_d"]["int"].fill_(99)
        held["grad"].zero_()
    held["objects"]["set"].add("late")
    held["list"][0].zero_()
    future.result(30)
    found = blank(wanted)
    client.load(found, checkpoint_id=tmp_path / "a")
    assert_same(found, wanted)


def test_many_saves_of_one_structure_reuse_one_arena(daemon, client, tmp_path):
    session = client.connect()
    for number in range(1, 6):
        client.save(everything(number), checkpoint_id=tmp_path / f"step-{number}")
    assert len(below(daemon.runtime.arenas, "*.arena")) == 1
    [job] = daemon.status()["jobs"]
    assert [save["sequence"] for save in job["generations"]] == [1, 2, 3, 4, 5]
    assert session.live
    for number in (1, 5):
        wanted = everything(number)
        found = blank(wanted)
        client.load(found, checkpoint_id=tmp_path / f"step-{number}")
        assert_same(found, wanted)


def test_a_structure_that_grows_is_saved_all_the_same(daemon, client, tmp_path):
    state = {"w": torch.ones(1000)}
    for number in range(6):
        state[f"more-{number}"] = torch.full((10 ** (number + 1),), float(number))
        state["text"] = "x" * 5 ** (number + 1)
        client.save(state, checkpoint_id=tmp_path / "a")
        found = blank(state)
        client.load(found, checkpoint_id=tmp_path / "a")
        assert_same(found, state)


def test_an_overwrite_keeps_foreign_files_and_old_ranks_files_go(daemon, client, tmp_path):
    target = tmp_path / "a"
    client.save({"w": torch.ones(9)}, checkpoint_id=target)
    (target / "config.json").write_text("mine")
    (target / "tokenizer").mkdir()
    (target / "tokenizer" / "vocabulary.txt").write_text("mine, too")
    (target / "__7_0.distcp").write_bytes(b"of an earlier, larger job")
    client.save({"w": torch.zeros(9)}, checkpoint_id=target)
    names = sorted(path.name for path in target.iterdir())
    assert names == [".ckptd", ".metadata", "__0_0.distcp", "config.json", "tokenizer"]
    assert (target / "config.json").read_text() == "mine"
    assert (target / "tokenizer" / "vocabulary.txt").read_text() == "mine, too"
    found = {"w": torch.ones(9)}
    stock_load(found, target)
    assert torch.equal(found["w"], torch.zeros(9))


@pytest.mark.parametrize("kind", ["stock's writer", "our writer", "our writer, handed over"])
@pytest.mark.parametrize("there", ["checkpoint", "folder", "nothing"])
def test_overwrite_false_leaves_the_old_checkpoint(daemon, client, tmp_path, kind, there):
    target = tmp_path / "a"
    if there == "checkpoint":
        client.save({"w": torch.ones(9)}, checkpoint_id=target)
    elif there == "folder":
        target.mkdir()
        (target / "notes.txt").write_text("mine")
    options = {"single_file_per_rank": False} if "handed over" in kind else {}
    writer = (stock if "stock" in kind else client).FileSystemWriter(target, overwrite=False, **options)
    found = {"w": torch.zeros(9)}
    if there == "checkpoint":
        future = client.async_save({"w": torch.zeros(9)}, storage_writer=writer)
        assert f"already exists at {target} and overwrite=False" in str(future.exception(30))
        if options == {}:
            assert future.staging_completion.exception(30) is not None  # before anything was staged
            assert {path.name for path in tmp_path.iterdir()} == {"a"}
    else:
        client.async_save({"w": torch.ones(9)}, storage_writer=writer).result(30)
        assert there == "nothing" or (target / "notes.txt").read_text() == "mine"
    client.load(found, checkpoint_id=target)
    assert torch.equal(found["w"], torch.ones(9))
    client.save({"w": torch.zeros(9)}, checkpoint_id=target)  # which may


def test_ids_are_any_text_that_names_a_directory(daemon, client, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ["with space", "ümlaut", "a.b", "-dash", "new/folders/are made", "x" * 150]:
        client.save({"w": torch.ones(3)}, checkpoint_id=name)
        found = {"w": torch.zeros(3)}
        client.load(found, checkpoint_id=tmp_path / name)
        assert torch.equal(found["w"], torch.ones(3))


def test_keys_that_are_no_text_find_their_place_again(daemon, client, tmp_path):
    wanted = {"optimizer": {"state": {0: {"step": 3, "m": torch.ones(2)}, 1: {"step": 4, "m": torch.zeros(2)}}}}
    client.save(wanted, checkpoint_id=tmp_path / "a")
    found = blank(wanted)
    client.load(found, checkpoint_id=tmp_path / "a")
    assert_same(found, wanted)
