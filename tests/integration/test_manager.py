"""A checkpoint manager with a real daemon: saves by interval, keeps what it should, resumes where it left off."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.clients import stock_load
from support.managed import names, spoil
from support.nursery import state
from support.trainers import Ranks
from support.waiting import wait_until

from ckptd.checkpoint.folder.catalog import read_header
from ckptd.checkpoint.folder.locks import reading
from ckptd.checkpoint.folder.user_data import MOST_BYTES
from ckptd.checkpoint.verify import verify_checkpoint

CKPTD = str(Path(sys.executable).with_name("ckptd"))
GLOO = "dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=world_size)"


def ckptd(*arguments):
    """Run ``ckptd`` and return its stdout."""
    done = subprocess.run([CKPTD, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def manager(daemon, client, tmp_path):
    def make(**options):
        return client.CheckpointManager(tmp_path / "run", client.ManagerOptions(**options))

    return make


@pytest.fixture
def settled(daemon):
    """Wait until the daemon has removed what it was going to remove."""

    def settle(root, *wanted):
        wait_until(lambda: names(root) == sorted(wanted), f"{wanted} in {root}, where are {names(root)}")
        wait_until(lambda: not any(job["retention"]["running"] for job in daemon.status()["jobs"]), "the removal's end")
        assert names(root) == sorted(wanted)

    return settle


def train(manager, steps, **options):
    """Save where it is due, and wait for each commit."""
    for step in steps:
        future = manager.save(step, state(1, step), metrics={"loss": 1.0 / (step + 1)}, **options)
        if future is not None:
            future.result(30)


def test_what_is_due_is_saved_and_listed_with_what_was_said_of_it(manager, tmp_path):
    mine = manager(every_steps=10, metric="loss", mode="max")
    train(mine, range(0, 31), metadata={"epoch": 1})
    assert mine.steps() == [0, 10, 20, 30]
    assert [info.path for info in mine.all()] == [str(tmp_path / "run" / f"step-{step}") for step in (0, 10, 20, 30)]
    latest = mine.latest()
    assert (latest.step, latest.metrics, latest.metadata) == (30, {"loss": 1 / 31}, {"epoch": 1})
    assert mine.best().step == 0
    assert mine.save(30, state()) is None
    assert (mine.failures.in_all, mine.preempted) == (0, False)


def test_as_much_as_may_be_said_harms_neither_seal_nor_tensors(manager, tmp_path):
    mine = manager()
    said = "x" * (MOST_BYTES - 100)
    mine.save(1, {"w": torch.arange(2000.0)}, metadata=said).result(30)
    assert verify_checkpoint(str(tmp_path / "run" / "step-1")).good
    found = {"w": torch.zeros(2000)}
    assert mine.restore(found).metadata == said
    assert torch.equal(found["w"], torch.arange(2000.0))
    stock_load(found, tmp_path / "run" / "step-1")


def test_what_is_in_flight_or_failed_is_not_listed(manager, client, tmp_path):
    (tmp_path / "run" / "step-3").mkdir(parents=True)
    (tmp_path / "run" / "step-4").write_text("")
    (tmp_path / "run" / ".step-5.ckptd-other-1-1-aa").mkdir()
    mine = manager()
    assert mine.steps() == []
    assert mine.save(4, state()).exception(30) is not None
    assert mine.steps() == []
    (tmp_path / "run" / ".step-5.ckptd-other-1-1-aa").rmdir()


def test_a_new_process_resumes_where_the_last_one_was(manager):
    train(manager(), range(3), metadata={"rng": [1, 2]})
    mine = manager(every_steps=1)
    target = state(1, -1.0)
    restored = mine.restore(target)
    assert (restored.step, restored.metadata, restored.metrics) == (2, {"rng": [1, 2]}, {"loss": 1 / 3})
    assert restored.report.complete
    assert torch.equal(target["model"]["w"], state(1, 2)["model"]["w"])
    assert [step for step in range(5) if mine.should_save(step)] == [3, 4]


@pytest.mark.parametrize(("wanted", "step"), [("latest", 3), ("best", 1), (2, 2)])
def test_one_restores_the_latest_the_best_or_a_step(manager, wanted, step):
    mine = manager(metric="acc", mode="max")
    for number, accuracy in ((1, 0.9), (2, 0.5), (3, 0.7)):
        mine.save(number, state(1, number), metrics={"acc": accuracy}).result(30)
    target = state(1, -1.0)
    assert mine.restore(target, wanted).step == step
    assert target["step"] == step


def test_a_step_that_is_not_there_is_an_error_and_no_other_is_taken(manager, client):
    mine = manager()
    train(mine, [1])
    with pytest.raises(client.errors.UnknownCheckpoint, match="step-2"):
        mine.restore(state(), 2)


def test_stock_reads_it_and_the_tools_show_it(manager, tmp_path):
    mine = manager(metric="loss")
    train(mine, [7], metadata={"note": "good"})
    mine.pin(7)
    path = tmp_path / "run" / "step-7"
    found = state(1, -1.0)
    stock_load(found, path)
    assert found["step"] == 7
    shown = json.loads(ckptd("inspect", path, "--json"))
    assert shown["user"] == {"step": 7, "metrics": {"loss": 0.125}, "metadata": {"note": "good"}}
    assert shown["pinned"] is True
    [listed] = json.loads(ckptd("ls", "--json", path.parent))["checkpoints"]
    assert listed["user"] == shown["user"]
    assert listed["pinned"] is True
    table = ckptd("ls", path.parent)
    assert "loss=0.125" in table
    assert "complete, pinned" in table
    assert "step: 7" in ckptd("inspect", path)
    assert "1 good" in ckptd("scrub", path.parent)


def test_the_metadata_appears_with_the_checkpoint_and_with_no_other(manager, client, tmp_path):
    mine = manager()
    train(mine, [1], metadata="first")
    client.save(state(), checkpoint_id=tmp_path / "run" / "step-2")  # not by a manager
    mine.save(1, state(1, 5.0), metadata="second", force=True).result(30)
    assert {info.step: info.metadata for info in mine.all()} == {1: "second", 2: None}
    assert "user" not in read_header(str(tmp_path / "run" / "step-2"))


class TestRetention:
    def test_keeps_the_last_the_regular_and_the_best(self, manager, settled, tmp_path, daemon):
        mine = manager(keep_last=2, keep_every_steps=4, keep_best=1, metric="score", mode="max")
        for step, score in ((1, 0.1), (2, 0.9), (3, 0.2), (4, 0.3), (5, 0.4), (6, 0.5), (7, 0.6)):
            mine.save(step, state(1, step), metrics={"score": score}).result(30)
        settled(tmp_path / "run", "step-2", "step-4", "step-6", "step-7")
        assert mine.steps() == [2, 4, 6, 7]
        assert daemon.metric("ckptd_removed_checkpoints_total") == 3

    def test_leaves_alone_what_no_manager_saved(self, manager, client, settled, tmp_path):
        client.save(state(), checkpoint_id=tmp_path / "run" / "step-1")
        client.save(state(), checkpoint_id=tmp_path / "run" / "final")
        train(manager(keep_last=1), [2, 3])
        settled(tmp_path / "run", "final", "step-1", "step-3")

    def test_leaves_alone_what_is_pinned_even_by_another_and_before_a_restart(self, manager, client, settled, tmp_path):
        train(manager(), [1, 2])
        manager().pin(1)
        client.connect()
        mine = manager(keep_last=1)
        train(mine, [3])
        settled(tmp_path / "run", "step-1", "step-3")
        mine.unpin(1)
        mine.retain()
        settled(tmp_path / "run", "step-3")
        with pytest.raises(client.errors.UnknownCheckpoint):
            mine.pin(1)

    def test_leaves_alone_what_is_being_read_and_takes_it_later(self, manager, settled, tmp_path, daemon):
        mine = manager(keep_last=1)
        train(mine, [1])
        with reading(str(tmp_path / "run" / "step-1")):
            train(mine, [2])
            wait_until(
                lambda: daemon.status()["jobs"][0]["retention"]["last"].get("held") == ["step-1"], "a held checkpoint"
            )
            target = state(1, -1.0)
            assert mine.restore(target, 1).step == 1
        train(mine, [3])
        settled(tmp_path / "run", "step-3")

    def test_a_load_in_another_process_holds_its_checkpoint(self, manager, trainers, settled, tmp_path, daemon):
        mine = manager(keep_last=1)
        train(mine, [1])
        reader = trainers.start()
        reader.do(
            "import ckptd.client.loading.loader as loader\n"
            "begun, go, real = threading.Event(), threading.Event(), loader.load_into\n"
            "def slow(*a, **k): begun.set(); assert go.wait(30); return real(*a, **k)\n"
            "loader.load_into = slow\n"
            "target = state(1, -1.0)\n"
            "work = threading.Thread(target=lambda: dcp.load(target, checkpoint_id=path))\n"
            "work.start(); assert begun.wait(30)",
            path=str(tmp_path / "run" / "step-1"),
        )
        train(mine, [2])
        wait_until(lambda: daemon.status()["jobs"][0]["retention"]["last"].get("held") == ["step-1"], "it is held")
        reader.do("go.set(); work.join(30)")
        assert reader.get("target['step']") == 1
        mine.retain()
        settled(tmp_path / "run", "step-2")

    def test_outlives_the_trainer(self, daemon, trainers, settled, tmp_path):
        trainer = trainers.start()
        root = str(tmp_path / "run")
        trainer.do(
            "manager = dcp.CheckpointManager(root, dcp.ManagerOptions(keep_last=1))\n"
            "manager.save(1, state()).result(30)\n"
            "manager.save(2, state()).staging_completion.result(30)\n"
            "os.write(1, b'')",
            root=root,
        )
        trainer.kill()
        settled(tmp_path / "run", "step-2")

    def test_of_two_jobs_in_one_folder_does_no_harm(self, daemon, client, trainers, tmp_path):
        ranks = [trainers.start() for _ in range(2)]
        for number, trainer in enumerate(ranks):
            trainer.start(
                "manager = dcp.CheckpointManager(root, dcp.ManagerOptions(keep_last=2))\n"
                "for step in range(number, 20, 2):\n"
                "    future = manager.save(step, state(1, step))\n"
                "future.result(60)\n"
                "assert manager.drain(60).safe\n",
                root=str(tmp_path / "run"),
                number=number,
            )
        for trainer in ranks:
            trainer.finish()
        manager = client.CheckpointManager(tmp_path / "run")
        wait_until(lambda: not any(job["retention"]["running"] for job in daemon.status()["jobs"]), "the removals' end")
        assert manager.steps()[-2:] == [18, 19]
        target = state(1, -1.0)
        assert manager.restore(target).step == 19
        assert target["step"] == 19
        assert all(job["retention"]["last"].get("errors", []) == [] for job in daemon.status()["jobs"])


class TestFallback:
    @pytest.mark.parametrize("how", ["bit", "missing", "truncated", "index", "no index"])
    def test_a_damaged_newest_one_is_passed_over_and_named(self, manager, tmp_path, how):
        mine = manager()
        train(mine, [1, 2, 3])
        spoil(tmp_path / "run" / "step-3", how)
        target = state(1, -1.0)
        restored = mine.restore(target)
        assert (restored.step, target["step"]) == (2, 2)
        assert [one.path for one in restored.report.passed_over] == [str(tmp_path / "run" / "step-3")]
        assert torch.equal(target["model"]["w"], state(1, 2)["model"]["w"])

    def test_when_all_are_damaged_training_does_not_begin_anew(self, manager, client, tmp_path):
        mine = manager()
        train(mine, [1, 2])
        for step in (1, 2):
            spoil(tmp_path / "run" / f"step-{step}", "index")
        with pytest.raises(client.errors.NoGoodCheckpoint):
            mine.restore(state())

    def test_a_step_that_was_named_is_not_replaced_unless_asked_for(self, manager, client, tmp_path):
        mine = manager()
        train(mine, [1, 2])
        spoil(tmp_path / "run" / "step-2")
        with pytest.raises(client.errors.WrongBits):
            mine.restore(state(), 2)
        assert mine.restore(state(), 2, fallback=True).step == 1


class TestOnFailure:
    @pytest.fixture
    def bad(self, tmp_path):
        (tmp_path / "file").write_text("in the way")
        return tmp_path / "file" / "a"

    def test_what_connect_was_told_holds_for_the_functions(self, daemon, client, tmp_path, bad):
        client.connect(on_failure="raise", max_consecutive_failures=2)
        assert client.async_save(state(), checkpoint_id=bad).exception(30) is not None
        with pytest.raises(client.CheckpointException, match=str(tmp_path / "file")):
            client.async_save(state(), checkpoint_id=tmp_path / "b")
        assert not (tmp_path / "b").exists()
        client.async_save(state(), checkpoint_id=bad).exception(30)
        with pytest.raises(client.errors.SavesFailing, match="2 saves in a row"):
            client.save(state(), checkpoint_id=tmp_path / "b")
        client.save(state(), checkpoint_id=tmp_path / "b")

    def test_a_blocking_save_raises_once(self, daemon, client, tmp_path, bad):
        client.connect(on_failure="raise")
        with pytest.raises(client.CheckpointException):
            client.save(state(), checkpoint_id=bad)
        client.save(state(), checkpoint_id=tmp_path / "b")

    def test_a_manager_has_its_own_say_or_connects(self, daemon, client, tmp_path, bad):
        client.connect(on_failure="raise")
        own = client.CheckpointManager(bad, client.ManagerOptions(on_failure="continue"))
        other = client.CheckpointManager(bad)
        for step in (1, 2):
            assert own.save(step, state()).exception(30) is not None
        assert own.failures.in_a_row == 2
        assert other.save(1, state()).exception(30) is not None
        with pytest.raises(client.CheckpointException):
            other.save(2, state())


class TestRanks:
    @pytest.fixture
    def ranks(self, daemon, trainers, tmp_path):
        made = Ranks(trainers.start(GLOO_SOCKET_IFNAME="lo") for _ in range(2))
        made.do(f"{GLOO}\nforbid_collectives()", store=str(tmp_path / "store"))
        return made

    def test_all_resume_from_the_same_though_the_newest_is_damaged_for_one(self, ranks, tmp_path):
        root = str(tmp_path / "run")
        ranks.do(
            "manager = dcp.CheckpointManager(root)\n"
            "for step in (1, 2): manager.save(step, {f'r{rank}': torch.full((9,), float(step))}, "
            "metadata={'step of rank 0': step} if rank == 0 else 'nobody keeps this').result(30)",
            root=root,
        )
        spoil(tmp_path / "run" / "step-2", item="r1")
        ranks.do("found = {f'r{rank}': torch.zeros(9)}\nrestored = manager.restore(found)")
        assert (
            ranks.get("(restored.step, restored.metadata, float(found[f'r{rank}'][0]))")
            == [(1, {"step of rank 0": 1}, 1.0)] * 2
        )
        assert len(set(ranks.get("str(restored.report.passed_over)"))) == 1

    def test_a_clock_is_rank_0s(self, ranks, tmp_path):
        ranks.do(
            "manager = dcp.CheckpointManager(root, dcp.ManagerOptions(every_minutes=1 if rank == 0 else 1e-9))\n"
            "answers = [manager.should_save(step) for step in range(3)]\n"
            "if rank == 0: manager._cadence._saved_at_s -= 61\n"
            "answers.append(manager.should_save(3))",
            root=str(tmp_path / "run"),
        )
        assert ranks.get("answers") == [[False, False, False, True]] * 2

    def test_a_failure_is_raised_by_all(self, ranks, tmp_path):
        (tmp_path / "file").write_text("")
        ranks.do(
            "manager = dcp.CheckpointManager(root, dcp.ManagerOptions(on_failure='raise'))\n"
            "state_dict = {f'r{rank}': torch.ones(9)}\n"
            "first = outcome(manager.save(1, state_dict))\n"
            "try: second = manager.save(2, state_dict)\n"
            "except dcp.CheckpointException as error: second = str(error)",
            root=str(tmp_path / "file"),
        )
        [(one, other), *rest] = ranks.get("(first, second)")
        assert rest == [(one, other)]
        assert other in one
        assert "Not a directory" in other or "File exists" in other
