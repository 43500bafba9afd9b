"""One save, event by event."""

from __future__ import annotations

import pytest

from ckptd.protocol.errors import (
    BadPlan,
    DeadlineExceeded,
    DiskFull,
    RankLost,
    RankMismatch,
    SaveSkipped,
    WriteIncomplete,
)
from ckptd.protocol.save import (
    Abandon,
    AnnounceCommit,
    Assign,
    Broke,
    Commit,
    ImageWritten,
    MakePlan,
    Planned,
    Proposed,
    Published,
    RankFell,
    RankHandedOver,
    RankSealed,
    RankStages,
    SaveHandedOver,
    SaveRules,
    State,
    Write,
)

ID = "/runs/step-7"
LOST = RankLost(1, 4711, "died")


def sealed(rank: int, digest: str = "a", nbytes: int = 10, checkpoint_id: str = ID) -> RankSealed:
    return RankSealed(rank, checkpoint_id, digest, nbytes)


def proposed(rank: int, digest: str = "b", checkpoint_id: str = ID) -> Proposed:
    return Proposed(rank, checkpoint_id, digest)


def steady(world_size: int = 2) -> SaveRules:
    """A save whose plan is known: digest "a" and 10 bytes for each rank."""
    return SaveRules(world_size, ("a",) * world_size, (10,) * world_size)


def play(save: SaveRules, *events):
    return [action for event in events for action in save.handle(event)]


def abandoned(save: SaveRules, *events) -> Abandon:
    """Return the one action with which the last event ends the save."""
    *before, last = events
    play(save, *before)
    [action] = save.handle(last)
    assert isinstance(action, Abandon)
    assert (save.state, save.error) == (State.FAILED, action.error)
    return action


def test_a_save_in_steady_state_needs_seals_and_writes_only():
    save = steady()
    assert save.handle(sealed(0)) == [Write(0)]
    assert (save.state, save.checkpoint_id) == (State.COLLECTING, ID)
    assert save.handle(sealed(1)) == [Write(1)]
    assert save.state is State.WRITING
    assert save.handle(ImageWritten(1, 10)) == []
    assert save.handle(ImageWritten(0, 10)) == [Commit()]
    assert save.state is State.COMMITTING
    assert save.handle(Published()) == [AnnounceCommit()]
    assert save.state is State.COMMITTED
    assert save.decided


def test_an_image_may_be_durable_before_another_is_sealed():
    save = steady()
    assert play(save, sealed(0), ImageWritten(0, 10)) == [Write(0)]
    assert play(save, sealed(1), ImageWritten(1, 10)) == [Write(1), Commit()]


class TestARankThatStagesInWaves:
    def stages(self, rank=0, digest="a", nbytes=10, checkpoint_id=ID):
        return RankStages(rank, checkpoint_id, digest, nbytes)

    def test_has_sealed_nothing_before_its_last_wave(self):
        save = steady()
        assert play(save, self.stages(0), self.stages(0)) == []
        assert (save.unsealed(), save.checkpoint_id) == ([0, 1], ID)
        assert play(save, sealed(0), self.stages(0)) == [Write(0)]  # a wave that is heard of late

    def test_takes_the_save_with_it_if_it_dies_before_that(self):
        assert abandoned(steady(1), self.stages(0), RankFell(0, LOST)).error is LOST

    @pytest.mark.parametrize(
        ("event", "kind"),
        [
            ({"digest": "old"}, BadPlan),
            ({"nbytes": 11}, WriteIncomplete),
            ({"checkpoint_id": "/elsewhere"}, RankMismatch),
            ({"rank": 2}, RankMismatch),
        ],
    )
    def test_is_stopped_at_once_if_it_stages_what_is_not_planned(self, event, kind):
        save = steady()
        play(save, sealed(1))
        assert isinstance(abandoned(save, self.stages(**event)).error, kind)

    def test_does_so_beside_ranks_that_hand_over_never(self):
        assert isinstance(abandoned(steady(), RankHandedOver(1, ID), self.stages(0)).error, RankMismatch)

    def test_lets_others_plan_once_it_has_sealed(self):
        save = steady()
        assert play(save, self.stages(0), proposed(1)) == []
        assert save.handle(sealed(0)) == [Write(0), MakePlan(frozenset({0}))]


def test_the_first_save_is_planned_once_all_have_proposed():
    save = SaveRules(2)
    assert save.handle(proposed(1, "b1")) == []
    assert save.waiting_for() == [0]
    assert save.handle(proposed(0, "b0")) == [MakePlan(frozenset())]
    assert save.handle(Planned(("b0", "b1"), (10, 20))) == [Assign(0), Assign(1)]
    assert play(save, sealed(0, "b0", 10), sealed(1, "b1", 20)) == [Write(0), Write(1)]
    assert play(save, ImageWritten(0, 10), ImageWritten(1, 20)) == [Commit()]


@pytest.mark.parametrize("proposal_first", [True, False])
def test_a_rank_whose_structure_changed_is_planned_around_those_that_have_staged(proposal_first):
    save = steady()
    news = [proposed(1), sealed(0)] if proposal_first else [sealed(0), proposed(1)]
    assert play(save, *news) == [Write(0), MakePlan(frozenset({0}))]
    assert save.handle(Planned(("a", "b"), (10, 20))) == [Assign(1)]
    assert play(save, sealed(1, "b", 20)) == [Write(1)]
    assert play(save, ImageWritten(0, 10), ImageWritten(1, 20)) == [Commit()]


def test_a_proposal_heard_twice_is_one():
    save = SaveRules(2)
    assert play(save, proposed(0), proposed(0), proposed(1), proposed(1)) == [MakePlan(frozenset())]
    plan = Planned(("b", "b"), (10, 10))
    assert play(save, plan, plan) == [Assign(0), Assign(1)]


def test_a_seal_heard_twice_is_written_once():
    save = steady()
    assert play(save, sealed(0), sealed(0), sealed(0, "other", 7)) == [Write(0)]


def test_a_proposal_of_a_rank_that_has_sealed_changes_nothing():
    save = steady()
    assert play(save, sealed(0), proposed(0), sealed(1)) == [Write(0), Write(1)]


def test_a_report_heard_twice_commits_once():
    save = steady()
    assert play(save, sealed(0), sealed(1)) == [Write(0), Write(1)]
    reports = [ImageWritten(0, 10), ImageWritten(0, 10), ImageWritten(1, 10), ImageWritten(1, 10)]
    assert play(save, *reports) == [Commit()]


def test_a_report_of_an_image_that_was_not_sealed_counts_for_nothing():
    save = steady()
    assert play(save, ImageWritten(1, 10), ImageWritten(2, 10), sealed(0), ImageWritten(0, 10)) == [Write(0)]
    assert not save.decided


def test_nothing_is_announced_that_was_not_to_be_published():
    save = steady()
    assert play(save, Published(), sealed(0), sealed(1), Published()) == [Write(0), Write(1)]
    assert save.state is State.WRITING


def test_a_plan_that_nobody_asked_for_is_not_taken():
    save = steady()
    assert save.handle(Planned(("x", "x"), (1, 1))) == []
    assert play(save, sealed(0)) == [Write(0)]


def test_a_short_image_ends_the_save():
    action = abandoned(steady(), sealed(0), sealed(1), ImageWritten(0, 9))
    assert str(action.error) == "rank 0: 9 of 10 bytes reported durable"
    assert not action.replan


def test_a_seal_of_another_size_than_planned_ends_the_save():
    action = abandoned(steady(), sealed(0, nbytes=11))
    assert str(action.error) == "rank 0: 11 of 10 bytes reported durable"


@pytest.mark.parametrize("save", [steady(), SaveRules(2)], ids=["another plan", "no plan"])
def test_a_seal_under_a_plan_that_is_not_in_force_ends_the_save(save):
    action = abandoned(save, sealed(1, "old"))
    assert isinstance(action.error, BadPlan)
    assert action.replan
    assert "rank 1 staged under a plan that is no longer in force" in str(action.error)


def test_a_seal_under_the_old_plan_is_refused_while_a_new_one_is_made():
    save = steady()
    play(save, sealed(0), proposed(1))
    action = abandoned(save, sealed(1))
    assert isinstance(action.error, BadPlan)


@pytest.mark.parametrize("event", [sealed(1, checkpoint_id="/else"), proposed(1, checkpoint_id="/else")])
def test_ranks_that_save_under_different_ids_fail_together(event):
    action = abandoned(steady(), sealed(0), event)
    assert action.error.report() == RankMismatch(1, "checkpoint id /else", f"save {ID}").report()
    assert action.replan


@pytest.mark.parametrize("rank", [-1, 2])
@pytest.mark.parametrize("event", [sealed, proposed])
def test_a_rank_outside_the_world_ends_the_save(rank, event):
    action = abandoned(steady(), event(rank))
    assert isinstance(action.error, RankMismatch)
    assert "are 2 ranks" in str(action.error)


def test_a_rank_that_dies_before_it_sealed_fails_the_save_for_all_with_the_cause():
    assert abandoned(steady(), sealed(0), RankFell(1, LOST)) == Abandon(LOST, replan=False)


def test_a_rank_that_dies_after_it_proposed_fails_the_save():
    assert abandoned(steady(), proposed(1), RankFell(1, LOST)).error is LOST


def test_a_rank_that_dies_after_it_sealed_is_not_missed():
    save = steady()
    assert play(save, sealed(1), RankFell(1, LOST), sealed(0), RankFell(0, LOST)) == [Write(1), Write(0)]
    assert play(save, ImageWritten(0, 10), ImageWritten(1, 10)) == [Commit()]
    assert play(save, RankFell(0, LOST), Published()) == [AnnounceCommit()]


def test_a_rank_that_skips_fails_the_save_without_making_the_plan_doubtful():
    assert not abandoned(steady(), RankFell(0, SaveSkipped(ID, 0))).replan


def test_a_failed_write_names_its_rank():
    action = abandoned(steady(), sealed(0), Broke(DiskFull("/runs", 10, 3), rank=0))
    assert str(action.error) == "rank 0: /runs: 10 bytes wanted, 3 free; free space and save again"


def test_a_failure_of_the_save_as_a_whole_keeps_its_error():
    error = DeadlineExceeded("save", 3.0)
    assert abandoned(steady(), sealed(0), Broke(error)).error is error


def test_a_plan_that_cannot_be_made_is_not_trusted_later():
    assert abandoned(steady(), Broke(BadPlan("w", "a gap"))).replan


def test_a_commit_can_still_fail():
    play(save := steady(1), sealed(0), ImageWritten(0, 10))
    assert abandoned(save, Broke(DiskFull("/runs", 1, 0))).error.code == "disk_full"


@pytest.mark.parametrize("end", ["committed", "failed"])
def test_news_about_a_save_that_is_decided_changes_nothing(end):
    save = steady(1)
    play(save, sealed(0), ImageWritten(0, 10), Published() if end == "committed" else Broke(LOST))
    before = (save.state, save.error)
    late = [
        *[sealed(0), sealed(0, "x"), sealed(5), proposed(0), ImageWritten(0, 3), RankFell(0, LOST)],
        *[Planned(("x",), (1,)), Published(), Broke(DiskFull("/", 1, 0))],
    ]
    assert play(save, *late) == []
    assert (save.state, save.error) == before
    assert save.state.value == end


def test_it_tells_whom_it_waits_for():
    save = steady(3)
    play(save, sealed(2), proposed(0))
    assert (save.waiting_for(), save.unsealed()) == ([1], [0, 1])


class TestHandOvers:
    """Ranks whose own planners and writers do the save."""

    def test_the_save_begins_when_all_ranks_have_handed_over_and_needs_no_plan(self):
        save = SaveRules(2)
        assert save.handle(RankHandedOver(1, ID)) == []
        assert save.waiting_for() == [0]
        assert save.handle(RankHandedOver(0, ID)) == [SaveHandedOver()]
        assert save.state is State.COMMITTING
        assert save.handle(Published()) == [AnnounceCommit()]

    def test_a_plan_of_earlier_saves_does_not_matter(self):
        assert steady(1).handle(RankHandedOver(0, ID)) == [SaveHandedOver()]

    def test_the_same_hand_over_heard_twice_counts_once(self):
        save = SaveRules(2)
        assert play(save, RankHandedOver(0, ID), RankHandedOver(0, ID)) == []

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            (RankHandedOver(0, ID), sealed(1)),
            (RankHandedOver(0, ID), proposed(1)),
            (sealed(0), RankHandedOver(1, ID)),
            (proposed(0), RankHandedOver(1, ID)),
        ],
        ids=["a seal", "a proposal", "after a seal", "after a proposal"],
    )
    def test_ranks_that_disagree_about_the_writer_fail_the_save(self, first, second):
        action = abandoned(steady(), first, second)
        assert isinstance(action.error, RankMismatch)
        assert action.error.rank == 1

    def test_another_checkpoint_id_fails_the_save(self):
        assert isinstance(abandoned(SaveRules(2), RankHandedOver(0, ID), RankHandedOver(1, "x")).error, RankMismatch)

    def test_a_rank_that_dies_after_it_handed_over_is_not_missed(self):
        save = SaveRules(2)
        assert play(save, RankHandedOver(1, ID), RankFell(1, LOST)) == []
        assert isinstance(abandoned(save, RankFell(0, LOST)).error, RankLost)

    def test_a_writer_that_fails_fails_the_save(self):
        save = SaveRules(1)
        save.handle(RankHandedOver(0, ID))
        assert abandoned(save, Broke(DeadlineExceeded("a worker", 3))).replan is False
