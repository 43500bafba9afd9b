"""When a checkpoint is due."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ckptd.protocol.cadence import Cadence


def due(steps, *, every_steps=None, every_s=None, step_s=1.0):
    """Return which steps are saved when a step takes so long, and whatever is due is saved."""
    cadence = Cadence(every_steps=every_steps, every_s=every_s, now_s=0.0)
    saved = []
    for step in steps:
        if cadence.due(step, step * step_s):
            cadence.note_saved(step, step * step_s)
            saved.append(step)
    return saved


def test_with_neither_every_step_is_due():
    assert due(range(4)) == [0, 1, 2, 3]


def test_by_steps():
    assert due(range(10), every_steps=4) == [0, 4, 8]


def test_by_time_since_the_last_save_was_begun():
    assert due(range(20), every_s=6.5) == [7, 14]


def test_by_both_whichever_comes_first():
    assert due(range(1, 20), every_steps=10, every_s=6) == [6, 10, 16]


def test_what_was_saved_or_resumed_from_is_not_due_again():
    cadence = Cadence(every_steps=1, every_s=None, now_s=0.0)
    assert cadence.last_step == -1
    cadence.note_saved(5, 0.0)
    assert [cadence.due(step, 1.0) for step in (4, 5, 6)] == [False, False, True]
    cadence.note_saved(2, 0.0)  # rolled back
    assert [cadence.due(step, 1.0) for step in (2, 3)] == [False, True]


@given(st.integers(1, 20), st.integers(4, 80).map(lambda n: n / 4), st.integers(1, 20).map(lambda n: n / 4))
def test_no_more_than_an_interval_passes_without_a_save(every_steps, every_s, step_s):
    steps = range(1, 100)
    saved = [0, *due(steps, every_steps=every_steps, every_s=every_s, step_s=step_s)]
    for before, after in zip(saved, [*saved[1:], 100], strict=True):
        assert after - before <= every_steps
        assert (after - before - 1) * step_s < every_s
