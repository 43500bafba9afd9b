"""The rules of retention, each alone; see also tests/property/test_retention.py."""

from __future__ import annotations

from support.managed import entry

from ckptd.checkpoint.folder.retention import choose_removals
from ckptd.protocol.retention_messages import Keep


def gone(entries, busy=(), **keep):
    return [one.step for one in choose_removals(entries, Keep(**keep), busy=busy)]


FIVE = [entry(step, committed_s=step) for step in (10, 20, 30, 40, 50)]


def test_without_a_limit_all_stay():
    assert gone(FIVE) == []
    assert gone([], last=1) == []


def test_the_last_k_stay_and_the_oldest_goes_first():
    assert gone(FIVE, last=2) == [10, 20, 30]


def test_every_nth_step_stays():
    assert gone(FIVE, last=1, every_steps=20) == [10, 30]


def test_the_best_k_stay_by_either_mode():
    scored = [entry(step, metrics={"loss": loss}) for step, loss in [(1, 0.5), (2, 0.1), (3, 0.9), (4, 0.3), (5, 0.7)]]
    assert gone(scored, last=1, best=2, metric="loss") == [1, 3]
    assert gone(scored, last=1, best=1, metric="loss", mode="max") == [1, 2, 4]


def test_of_equal_values_the_newer_is_the_better():
    same = [entry(step, metrics={"loss": 0.5}) for step in (1, 2, 3, 4)]
    assert gone(same, last=1, best=2, metric="loss") == [1, 2]


def test_what_was_committed_last_stays_even_if_its_step_is_an_old_one():
    rolled_back = [*FIVE, entry(5, committed_s=99)]
    assert gone(rolled_back, last=1) == [10, 20, 30, 40]


def test_what_is_incomplete_or_not_ours_is_neither_counted_nor_removed():
    others = [entry(60, complete=False), entry(70, managed=False), *FIVE]
    assert gone(others, last=2) == [10, 20, 30]


def test_what_is_pinned_or_being_saved_stays_but_counts():
    assert gone([entry(45, pinned=True), *FIVE], last=2, busy=["step-30"]) == [10, 20, 40]
