"""All ranks of a job end a save alike: committed, or failed with the one root cause that names the rank."""

import pytest
from support.clients import assert_holds, stock_load
from support.nursery import state
from support.processes import stopped
from support.trainers import Ranks, TrainerRaised
from support.waiting import wait_until

SAVE = "future = dcp.async_save(state(value=value), checkpoint_id=path)"


def save(ranks, path, value=1.0):
    """Save on all ranks and return how it ended on each."""
    ranks.do(SAVE, path=str(path), value=value)
    return ranks.get("outcome(future)")


def test_a_rank_killed_before_it_staged_fails_the_save_on_the_others_alike(daemon, trainers, tmp_path):
    ranks = trainers.job(4)
    assert save(ranks, tmp_path / "a") == ["committed"] * 4
    victim, others = ranks[2], Ranks([*ranks[:2], ranks[3]])
    victim.do("session._copier.copy = lambda pairs: threading.Event().wait()")
    victim.start(SAVE, path=str(tmp_path / "b"), value=2.0)
    others.do(SAVE, path=str(tmp_path / "b"), value=2.0)
    daemon.wait_for_save(tmp_path / "b", lambda save: save["ranks_sealed"] == 3)
    victim.kill()
    errors = others.get("outcome(future)")
    assert len(set(errors)) == 1
    assert f"rank 2 (pid {victim.pid})" in errors[0]
    assert not (tmp_path / "b").exists()
    # Those that live learn at once that the job is incomplete; nobody waits for the dead.
    again = save(others, tmp_path / "c")
    assert len(set(again)) == 1
    assert "rank 2" in again[0]
    for rank in others:
        rank.kill()
    restarted = trainers.job(4)
    assert restarted.get("session.incarnation") == [2] * 4
    assert save(restarted, tmp_path / "b", 2.0) == ["committed"] * 4
    assert_holds(tmp_path / "b", value=2.0)


def test_a_rank_that_gives_up_fails_the_save_on_all_alike(daemon, trainers, tmp_path):
    ranks = trainers.job(2)
    assert save(ranks, tmp_path / "a") == ["committed"] * 2
    ranks[1].do("ordinary, state = state, lambda value: {'bad': torch.eye(2).to_sparse()}")
    errors = save(ranks, tmp_path / "a", 2.0)
    assert errors[0] == errors[1]
    assert "rank 1" in errors[0]
    assert "bad" in errors[0]
    assert "sparse" in errors[0]
    ranks[1].do("state = ordinary")
    assert_holds(tmp_path / "a", value=1.0)
    assert save(ranks, tmp_path / "a", 3.0) == ["committed"] * 2
    assert_holds(tmp_path / "a", value=3.0)


def test_a_rank_that_fails_at_the_first_save_fails_it_on_all(daemon, trainers, tmp_path):
    ranks = trainers.job(2)
    ranks[0].do("state = lambda value: {'bad': threading.Lock()}")
    errors = save(ranks, tmp_path / "a")
    assert errors[0] == errors[1]
    assert "rank 0" in errors[0]
    assert list(tmp_path.iterdir()) == []


def test_a_rank_whose_own_code_fails_is_named_to_all(daemon, trainers, tmp_path):
    ranks = trainers.job(2, progress_timeout_s=5.0)
    assert save(ranks, tmp_path / "a") == ["committed"] * 2
    ranks[1].do(
        "class Broken:\n"
        "    def state_dict(self): raise ZeroDivisionError('my own bug')\n"
        "    def load_state_dict(self, state): pass\n"
        "ordinary, state = state, lambda value: {**ordinary(), 'broken': Broken()}"
    )
    ranks[0].start(SAVE, path=str(tmp_path / "b"), value=2.0)
    ranks[1].start(f"try:\n    {SAVE}\nexcept ZeroDivisionError:\n    pass", path=str(tmp_path / "b"), value=2.0)
    ranks.finish()
    error = ranks[0].get("outcome(future)")
    assert "rank 1" in error
    assert "my own bug" in error
    ranks[1].do("state = ordinary")
    assert save(ranks, tmp_path / "b", 3.0) == ["committed"] * 2


def test_ranks_that_save_different_ids_at_the_same_call_all_fail(daemon, trainers, tmp_path):
    ranks = trainers.job(2)
    assert save(ranks, tmp_path / "a") == ["committed"] * 2
    ranks.do("mine = f'{path}-{rank}'", path=str(tmp_path / "b"))
    ranks.do("future = dcp.async_save(state(), checkpoint_id=mine)")
    errors = ranks.get("outcome(future)")
    assert errors[0] == errors[1]
    assert errors[0].startswith("RankMismatch")
    assert str(tmp_path / "b-0") in errors[0]
    assert str(tmp_path / "b-1") in errors[0]
    wait_until(lambda: [path.name for path in tmp_path.iterdir()] == ["a"], "the removal of what was written")
    assert save(ranks, tmp_path / "c") == ["committed"] * 2


@pytest.mark.parametrize(
    ("theirs", "kind", "words"),
    [
        ("rank=0, world_size=2", "RankTaken", "rank 0 of job 'job' is held by pid"),
        ("rank=1, world_size=3", "RankMismatch", "world size 3"),
        ("rank=5, world_size=2", "RankMismatch", "rank 5 of 2"),
    ],
)
def test_a_rank_that_does_not_fit_into_the_job_is_refused(daemon, trainers, tmp_path, theirs, kind, words):
    ranks = trainers.job(2)
    stray = trainers.start()
    with pytest.raises(TrainerRaised) as caught:
        stray.do(f"dcp.connect(job='job', {theirs})")
    assert caught.value.kind == kind
    assert words in caught.value.text
    assert save(ranks, tmp_path / "a") == ["committed"] * 2


def test_a_job_on_several_nodes_is_refused(daemon, trainers, tmp_path):
    rank = trainers.start(WORLD_SIZE="4", LOCAL_WORLD_SIZE="2")
    with pytest.raises(TrainerRaised) as caught:
        rank.do("dcp.connect(job='wide', rank=0, world_size=4)")
    assert caught.value.kind == "MultiNode"
    assert "4 ranks, 2 of them on this node" in caught.value.text
    assert daemon.status()["jobs"] == []
    # One that saves for itself is no business of the others.
    rank.do("dcp.save(state(), checkpoint_id=path, no_dist=True)", path=str(tmp_path / "a"))


def test_a_rank_without_a_slot_skips_the_save_on_all(daemon, trainers, tmp_path):
    ranks = trainers.job(2, on_busy="skip", slots=1)
    assert save(ranks, tmp_path / "a") == ["committed"] * 2
    with stopped(*daemon.workers(2)):
        ranks.do(SAVE.replace("future", "first"), path=str(tmp_path / "b"), value=2.0)
        ranks.do(SAVE, path=str(tmp_path / "c"), value=3.0)
        errors = ranks.get("outcome(future)")
    assert errors[0] == errors[1]
    assert "skip" in errors[0]
    assert ranks.get("outcome(first)") == ["committed"] * 2
    assert save(ranks, tmp_path / "d", 4.0) == ["committed"] * 2


def test_a_rank_that_never_calls_fails_the_others_within_their_deadline(daemon, trainers, tmp_path):
    ranks = trainers.job(2, progress_timeout_s=2.0)
    ranks[0].start(SAVE, path=str(tmp_path / "a"), value=1.0)
    ranks[0].finish()
    error = ranks[0].get("outcome(future)")
    assert error.startswith("DeadlineExceeded")
    assert "waits for rank 1" in error
    # The late one hears the same, and the next save works.
    ranks[1].do(SAVE, path=str(tmp_path / "a"), value=1.0)
    assert ranks[1].get("outcome(future)") == error
    assert save(ranks, tmp_path / "b") == ["committed"] * 2


def test_a_rank_that_leaves_fails_the_next_save_of_the_others(daemon, trainers, tmp_path):
    ranks = trainers.job(2)
    assert save(ranks, tmp_path / "a") == ["committed"] * 2
    ranks[1].leave()
    wait_until(lambda: len(daemon.status()["jobs"][0]["sessions"]) == 1, "the end of rank 1's session")
    ranks[0].do(SAVE, path=str(tmp_path / "b"), value=2.0)
    assert "rank 1" in ranks[0].get("outcome(future)")


def test_a_new_start_of_a_job_fences_the_ranks_of_the_old_one(daemon, trainers, tmp_path):
    ranks = trainers.job(2)
    assert save(ranks, tmp_path / "a") == ["committed"] * 2
    ranks[0].kill()
    [successor] = trainers.job(1)
    with pytest.raises(TrainerRaised, match="incarnation 2"):
        wait_until(lambda: not ranks[1].get("session.live"), "the old rank's notice")
        ranks[1].do(SAVE, path=str(tmp_path / "b"), value=9.0)
    successor.do(SAVE, path=str(tmp_path / "b"), value=2.0)
    assert successor.get("outcome(future)") == "committed"
    assert_holds(tmp_path / "b", value=2.0)


def test_a_structure_that_changes_on_one_rank_is_planned_anew(daemon, trainers, tmp_path):
    ranks = trainers.job(2)
    assert save(ranks, tmp_path / "a") == ["committed"] * 2
    ranks[1].do("ordinary, state = state, lambda value: {**ordinary(value=value), 'extra': torch.ones(7)}")
    assert save(ranks, tmp_path / "b", 2.0) == ["committed"] * 2
    found = {**state(value=0.0), "extra": state()["model"]["w"][:7] * 0}
    stock_load(found, tmp_path / "b")
    assert found["extra"].tolist() == [1.0] * 7
    assert_holds(tmp_path / "b", value=2.0)
