"""Plan caching: every rank has a cache of its own, as processes have; what was cached is named by its content."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, load, save
from torch.distributed.checkpoint import default_planner as stock
from torch.distributed.checkpoint.planner import SavePlan

from ckptd.checkpoint.planners import DefaultSavePlanner
from ckptd.checkpoint.planners.cache import MOST_KEPT, NamedPlan, PlanCache
from ckptd.protocol.errors import BadPlan


class Job:
    """Ranks whose planners are made anew for every save, as users do."""

    def __init__(self, world_size):
        self.caches = [PlanCache() for _ in range(world_size)]
        self.kind = DefaultSavePlanner
        self.settings = {}

    def save(self, states, *, to_rank=lambda plan: plan, from_rank=lambda plan: plan):
        """Return what each rank sent, was sent and wrote, and the metadata; plans cross as pickles, as they do."""
        planners = []
        for cache, state in zip(self.caches, states, strict=True):
            planner = self.kind(enable_plan_caching=True, **self.settings)
            planner._cache = cache
            planner.set_up_planner(state, is_coordinator=not planners)
            planners.append(planner)
        sent = [from_rank(crossed(planner.create_local_plan())) for planner in planners]
        answers, metadata = planners[0].create_global_plan(sent)
        answers = [dataclasses.replace(plan, storage_data=f"prefix {rank}") for rank, plan in enumerate(answers)]
        answers = [to_rank(crossed(answer)) for answer in answers]
        written = [planner.finish_plan(answer) for planner, answer in zip(planners, answers, strict=True)]
        return sent, answers, written, metadata


def crossed(plan):
    return pickle.loads(pickle.dumps(plan))


def state(rank=0, **more):
    return {"model": {"w": torch.ones(4), "b": torch.ones(2)}, f"of rank {rank}": rank, **more}


def states(world_size=2, **more):
    return [state(rank, **more) for rank in range(world_size)]


def overridden(step):
    """Return a method of a subclass that does what the inherited one does."""
    inherited = getattr(DefaultSavePlanner, step)

    def method(self, *args):
        return inherited(self, *args)

    return method


def is_short(plan):
    return not plan.usable and not plan.items


def uncached(states, **settings):
    """Return what torch's planners make of state dicts without caching."""
    planners = []
    for one in states:
        planner = stock.DefaultSavePlanner(**settings)
        planner.set_up_planner(one, is_coordinator=not planners)
        planners.append(planner)
    plans, metadata = planners[0].create_global_plan([planner.create_local_plan() for planner in planners])
    return [plan.items for plan in plans], metadata


def test_an_unchanged_plan_crosses_as_its_name_only():
    job = Job(3)
    first = job.save(states(3))
    assert not any(is_short(plan) for plan in first[0] + first[1])
    second = job.save(states(3))
    assert all(is_short(plan) for plan in second[0] + second[1])
    for sent, answers, written, metadata in (first, second):
        items, wanted = uncached(states(3))
        assert [plan.items for plan in written] == items
        assert metadata == wanted
        assert len(sent) == len(answers) == 3


def test_a_rank_that_changes_does_not_make_the_others_speak():
    job = Job(2)
    job.save(states())
    changed = [state(0), state(1, more=torch.ones(3))]
    sent, _, written, metadata = job.save(changed)
    assert [is_short(plan) for plan in sent] == [True, False]
    items, wanted = uncached(changed)
    assert [plan.items for plan in written] == items
    assert metadata == wanted


def test_models_that_take_turns_are_told_apart():
    job = Job(2)
    policy, critic = states(), [{"critic": torch.ones(9)}] * 2
    for _ in range(3):
        for model in (policy, critic):
            _, _, written, metadata = job.save(model)
            items, wanted = uncached(model)
            assert [plan.items for plan in written] == items
            assert metadata == wanted
    assert all(is_short(plan) for plan in job.save(critic)[0])


@pytest.mark.parametrize(
    "other",
    [
        {"model": {"w": torch.ones(5), "b": torch.ones(2)}},
        {"model": {"w": torch.ones(4, dtype=torch.int64), "b": torch.ones(2)}},
        {"model.w": torch.ones(4), "model": {"b": torch.ones(2)}},
        {"model": {"b": torch.ones(2), "w": torch.ones(4)}},
        {"model": {"w": 4, "b": torch.ones(2)}},
    ],
    ids=["shape", "dtype", "path", "order", "kind"],
)
def test_a_plan_that_differs_in_anything_is_another_plan(other):
    job = Job(1)
    job.save([{"model": {"w": torch.ones(4), "b": torch.ones(2)}}])
    sent, _, written, metadata = job.save([other])
    items, wanted = uncached([other])
    assert not is_short(sent[0])
    assert written[0].items == items[0]
    assert metadata == wanted


@pytest.mark.parametrize("settings", [{"dedup_save_to_lowest_rank": True}, {"flatten_state_dict": False}])
def test_other_settings_are_another_plan(settings):
    job = Job(2)
    job.save(states())
    job.settings = settings
    sent, _, written, metadata = job.save(states())
    assert not any(is_short(plan) for plan in sent)
    items, wanted = uncached(states(), **settings)
    assert [plan.items for plan in written] == items
    assert metadata.planner_data == wanted.planner_data


def test_a_world_of_another_size_is_another_plan():
    job = Job(3)
    job.save(states(3))
    job.caches = job.caches[:2]
    _, _, written, metadata = job.save(states(2))
    assert ([plan.items for plan in written], metadata) == uncached(states(2))


def test_metadata_is_the_saves_own():
    """A storage writer fills it in; torch hands out the same object again and again."""
    job = Job(1)
    job.save(states(1))
    one, other = job.save(states(1))[3], job.save(states(1))[3]
    one.storage_data = "of the first"
    one.state_dict_metadata.clear()
    assert other.storage_data is None
    assert len(job.save(states(1))[3].state_dict_metadata) == 3


def test_storage_data_is_that_of_this_save():
    job = Job(2)
    job.save(states())
    _, _, written, _ = job.save(states(), to_rank=lambda plan: dataclasses.replace(plan, storage_data="another place"))
    assert [plan.storage_data for plan in written] == ["another place"] * 2


class TestNothingIsTakenForGranted:
    def test_a_save_that_failed_in_planning_is_followed_by_full_plans(self):
        job = Job(2)
        job.save(states())

        def broken(plan):
            raise OSError("the network")

        with pytest.raises(OSError, match="the network"):
            job.save(states(), from_rank=broken)
        sent, _, written, _ = job.save(states())
        assert [is_short(plan) for plan in sent] == [False, True]  # only the first rank had offered its plan
        assert [plan.items for plan in written] == uncached(states())[0]

    def test_a_coordinator_that_knows_nothing_refuses_and_is_told_everything_next(self):
        job = Job(2)
        job.save(states())
        job.caches[0].local.clear()
        job.caches[0].made._entries.clear()
        with pytest.raises(BadPlan, match=r"rank 0 left out a plan .* save again"):
            job.save(states())
        sent, _, written, metadata = job.save(states())
        assert not any(is_short(plan) for plan in sent)
        assert ([plan.items for plan in written], metadata) == uncached(states())

    def test_an_answer_that_names_a_plan_we_do_not_have_is_refused(self):
        job = Job(2)
        with pytest.raises(BadPlan, match="this rank does not have"):
            job.save(states(), to_rank=lambda plan: NamedPlan([], usable=False, local=plan.local, final="another"))

    def test_a_bad_plan_is_not_kept(self):
        job = Job(2)
        bad = [{"w": torch.ones(2)}, {"w": torch.ones(3)}]
        for _ in range(2):
            with pytest.raises(BadPlan):
                job.save(bad)
        assert [plan.items for plan in job.save(states())[2]] == uncached(states())[0]

    def test_a_writer_that_makes_plans_anew_costs_the_saving_only(self):
        job = Job(2)

        def anew(plan):
            return SavePlan(plan.items, plan.storage_data, plan.planner_data, plan.usable)

        for _ in range(3):
            sent, _, written, metadata = job.save(states(), from_rank=anew)
            assert not any(is_short(plan) for plan in sent)
            assert ([plan.items for plan in written], metadata) == uncached(states())

    def test_a_writer_that_changes_items_is_heard_every_time(self):
        job = Job(1)

        def without_objects(plan):
            return dataclasses.replace(plan, items=[item for item in plan.items if item.tensor_data is not None])

        for _ in range(3):
            sent, _, written, _ = job.save(states(1), from_rank=without_objects)
            assert [item.index.fqn for item in written[0].items] == ["model.w", "model.b"]
            assert not is_short(sent[0])
        for _ in range(3):
            _, answers, written, _ = job.save(states(1), to_rank=without_objects)
            assert [item.index.fqn for item in written[0].items] == ["model.w", "model.b"]
            assert not is_short(answers[0])

    @pytest.mark.parametrize("step", ["create_local_plan", "create_global_plan", "finish_plan", "_dedup_save_plans"])
    def test_a_planner_with_a_step_of_its_own_is_never_cached(self, step):
        job = Job(2)
        job.kind = type("Mine", (DefaultSavePlanner,), {step: overridden(step)})
        for _ in range(2):
            sent, answers, _, _ = job.save(states())
            assert not any(isinstance(plan, NamedPlan) for plan in sent + answers)


def test_the_oldest_plan_goes_first():
    job = Job(1)
    shapes = [[{"w": torch.ones(size)}] for size in range(1, MOST_KEPT + 2)]
    for one in shapes:
        job.save(one)
    assert is_short(job.save(shapes[-1])[0][0])
    assert is_short(job.save(shapes[1])[0][0])
    assert not is_short(job.save(shapes[0])[0][0])
    assert len(job.caches[0].known._entries) == len(job.caches[0].made._entries) == MOST_KEPT


def test_a_rank_whose_plans_alternate_while_the_other_goes_on_changing_is_understood():
    job = Job(2)
    for number in range(3 * MOST_KEPT):
        changing = [state(0, **({"x": 1} if number % 10 == 0 else {})), {"w": torch.ones(number + 1)}]
        _, _, written, metadata = job.save(changing)
        assert ([plan.items for plan in written], metadata) == uncached(changing)


def test_ranks_that_share_a_process_do_not_take_each_others_plans():
    job = Job(2)
    job.caches = job.caches[:1] * 2
    alike = [{"a": torch.ones(4), "b": torch.ones(4)}] * 2
    for _ in range(4):
        _, _, written, metadata = job.save(alike)
        assert ([plan.items for plan in written], metadata) == uncached(alike)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_torchs_own_save_runs_with_it(tmp_path):
    state = {"model": {"w": torch.arange(4.0)}, "step": 1}
    cache = PlanCache()
    for number in range(3):
        planner = DefaultSavePlanner(enable_plan_caching=True)
        planner._cache = cache
        state["model"]["w"] += 1
        state["step"] = number
        save(state, storage_writer=FileSystemWriter(tmp_path / str(number)), planner=planner, no_dist=True)
        found = {"model": {"w": torch.zeros(4)}, "step": None}
        load(found, storage_reader=FileSystemReader(tmp_path / str(number)), no_dist=True)
        assert torch.equal(found["model"]["w"], state["model"]["w"])
        assert found["step"] == number
    assert is_short(planner._offer.sent)


def test_a_planner_can_be_copied_and_pickled():
    planner = DefaultSavePlanner(enable_plan_caching=True)
    assert copy.copy(planner)._cache is planner._cache
    again = pickle.loads(pickle.dumps(planner))
    again.set_up_planner({"w": torch.ones(2)})
    assert again.create_local_plan().usable
