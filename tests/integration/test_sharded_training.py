"""Training jobs of every kind resume as if nothing had happened, and go on as a job of any other kind."""

import pytest
from support.sharded_training import KINDS
from support.sharded_worlds import worlds
from support.states import assert_same

WAYS = ("ours to ours", "ours to stock", "stock to ours")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The worlds."""
    with worlds(tmp_path_factory.mktemp("training")) as shared:
        yield shared


@pytest.fixture(scope="module")
def trained(shared):
    """Losses, and what each rank holds in the end, by kind: of jobs that were never interrupted."""
    found = {}
    for name, kind in KINDS.items():
        ranks = shared.of_size(kind.world_size)
        ranks.do("import support.sharded_training as training")
        found[name] = ranks.get("training.train_and_save(kind, root)", kind=name)
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_job_goes_on_as_if_uninterrupted(shared, trained, kind, way):
    resumed = shared.of_size(KINDS[kind].world_size).get("training.resume(kind, root, way)", kind=kind, way=way)
    for (losses, held), (step, losses_after, held_after) in zip(trained[kind], resumed, strict=True):
        assert step == 2
        assert losses_after == losses[2:]
        assert_same(held_after, held)


@pytest.fixture(scope="module")
def changed(shared, trained):
    """What was wrong, on which rank, when a kind went on as another one, by loader."""
    found = {}
    for reader, kind in KINDS.items():
        by_rank = shared.of_size(kind.world_size).get("training.load_others(kind, root)", kind=reader)
        for writer, load in by_rank[0]:
            wrong = {rank: told[writer, load] for rank, told in enumerate(by_rank) if told[writer, load]}
            found.setdefault((writer, reader), {})[load] = wrong
    return found


@pytest.mark.parametrize("reader", KINDS)
@pytest.mark.parametrize("writer", KINDS)
def test_a_job_goes_on_as_one_of_another_kind(changed, writer, reader):
    wrong = changed[writer, reader]
    assert wrong["ours"] == {}
    assert wrong == {load: {} for load in wrong}
