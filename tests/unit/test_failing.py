"""The rules of what a save call does about saves before it that failed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.protocol.errors import DiskFull, RankFailed, SavesFailing, SaveSkipped, SystemCallFailed
from ckptd.protocol.failing import REMEMBERED, FailureRules, Go, Pause, Raise, counts

ERRORS = [SystemCallFailed("pwrite", "/x", number) for number in range(6)]


def rules(on_failure, limit=None, **ended):
    """Rules that have heard of saves: ``s1=None`` committed, ``s2=error`` failed."""
    made = FailureRules(on_failure, limit)
    for name, error in ended.items():
        made.note(int(name[1:]), error)
    return made


def test_without_failures_all_go():
    for on_failure in ("continue", "raise", "pause"):
        assert rules(on_failure, 1).verdict() == Go()
        assert rules(on_failure, 1, s1=None, s2=None).verdict() == Go()


def test_continue_goes_on():
    made = rules("continue", s1=ERRORS[1], s2=ERRORS[2])
    assert made.verdict() == Go()
    assert (made.failed_in_all, made.in_a_row()) == (2, [ERRORS[2], ERRORS[1]])


def test_raise_raises_once_and_the_newest_of_several():
    made = rules("raise", s1=ERRORS[1], s2=ERRORS[2])
    assert made.verdict() == Raise(ERRORS[2])
    assert made.verdict() == Go()
    made.note(3, ERRORS[3])
    assert made.verdict() == Raise(ERRORS[3])


def test_raise_raises_what_failed_before_a_save_that_worked():
    assert rules("raise", s1=ERRORS[1], s2=None).verdict() == Raise(ERRORS[1])


def test_raise_does_not_raise_what_the_caller_has_heard():
    made = rules("raise", s1=ERRORS[1])
    made.note_raised(1)
    assert made.verdict() == Go()


def test_pause_pauses_until_a_save_works():
    made = rules("pause", s1=ERRORS[1])
    assert made.verdict() == made.verdict() == Pause(ERRORS[1])
    made.note(2, None)
    assert made.verdict() == Go()


@pytest.mark.parametrize("on_failure", ["continue", "pause"])
def test_the_limit_raises_and_then_gives_as_many_tries_again(on_failure):
    made = rules(on_failure, 2, s1=ERRORS[1])
    assert not isinstance(made.verdict(), Raise)
    made.note(2, ERRORS[2])
    raised = made.verdict()
    assert isinstance(raised, Raise)
    assert isinstance(raised.error, SavesFailing)
    assert (raised.error.count, raised.error.last) == (2, str(ERRORS[2]))
    assert made.verdict() == Go()
    made.note(3, ERRORS[3])
    assert not isinstance(made.verdict(), Raise)
    made.note(4, ERRORS[4])
    assert isinstance(made.verdict(), Raise)


def test_with_raise_the_limit_counts_what_was_raised():
    made = rules("raise", 2, s1=ERRORS[1])
    assert made.verdict() == Raise(ERRORS[1])
    made.note(2, ERRORS[2])
    assert isinstance(made.verdict().error, SavesFailing)


def test_a_save_that_works_ends_the_row():
    assert rules("continue", 2, s1=ERRORS[1], s2=None, s3=ERRORS[3]).verdict() == Go()


@pytest.mark.parametrize("error", [SaveSkipped("/x", 0), RankFailed(1, "save_skipped", "skipped")])
def test_what_was_skipped_by_policy_is_no_failure(error):
    assert not counts(error)
    assert rules("raise", 1, s1=error).verdict() == Go()
    assert counts(RankFailed(1, "disk_full", "full"))
    assert counts(None)


def test_the_first_word_on_a_save_counts():
    made = rules("pause", s1=ERRORS[1])
    made.note(1, None)
    assert made.verdict() == Pause(ERRORS[1])
    assert made.failed_in_all == 1


def test_only_so_many_are_remembered():
    made = rules("raise")
    for number in range(1, REMEMBERED + 10):
        made.note(number, None)
    assert len(made.outcomes) == REMEMBERED


@given(
    st.sampled_from(["continue", "raise", "pause"]),
    st.none() | st.integers(1, 4),
    st.lists(st.dictionaries(st.integers(1, 12), st.sampled_from([None, DiskFull("/x", 1, 0), *ERRORS]), max_size=6)),
)
def test_ranks_that_agree_on_the_outcomes_come_to_the_same_verdict(on_failure, limit, rounds):
    """Whatever each heard at which moment."""
    one, other = FailureRules(on_failure, limit), FailureRules(on_failure, limit)
    for heard in rounds:
        for number, error in heard.items():
            one.note(number, error)
        agreed = {**one.outcomes}
        for number, error in agreed.items():
            other.note(number, error)
        first, second = one.verdict(agreed), other.verdict(agreed)
        assert type(first) is type(second)
        assert str(getattr(first, "error", "")) == str(getattr(second, "error", ""))
