"""Whatever lies in a folder and whatever is to be kept: what must not go never goes, and no more stays than must."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st
from support.managed import entry

from ckptd.checkpoint.folder.retention import best_first, choose_removals
from ckptd.protocol.retention_messages import Keep

often = settings(max_examples=300, deadline=None)
METRICS = st.none() | st.sampled_from([0.0, 1.0, 2.0, -1.0, math.inf, math.nan])


@st.composite
def folders(draw):
    entries = []
    for step in draw(st.lists(st.integers(0, 30), unique=True, max_size=12)):
        metric = draw(METRICS)
        entries.append(
            entry(
                step,
                committed_s=draw(st.integers(0, 50)),
                metrics={} if metric is None else {"loss": metric},
                pinned=draw(st.booleans()),
                complete=draw(st.sampled_from([True, True, True, False])),
                managed=draw(st.sampled_from([True, True, True, False])),
            )
        )
    return entries


keeps = st.builds(
    Keep,
    st.none() | st.integers(1, 5),
    st.integers(0, 6),
    st.integers(0, 3),
    st.sampled_from(["", "loss"]),
    st.sampled_from(["min", "max"]),
)
busy_steps = st.sets(st.integers(0, 30), max_size=3)


@often
@given(folders(), keeps, busy_steps)
def test_what_must_not_go_never_goes(entries, keep, busy):
    names = {f"step-{step}" for step in busy}
    gone = choose_removals(entries, keep, busy=names)
    committed = [one for one in entries if one.managed and one.complete]
    for one in gone:
        assert one in committed
        assert not one.pinned
        assert one.name not in names
        assert one.step < max(other.step for other in committed)
        assert one.committed_unix_s <= max(other.committed_unix_s for other in committed)
        assert not (keep.every_steps and one.step % keep.every_steps == 0)
        assert sum(other.step > one.step for other in committed) >= keep.last
    if committed:
        newest = max(committed, key=lambda one: one.committed_unix_s)
        assert [one for one in committed if one.committed_unix_s == newest.committed_unix_s and one not in gone]


@often
@given(folders(), keeps)
def test_what_nothing_keeps_goes(entries, keep):
    gone = choose_removals(entries, keep)
    if keep.last is None:
        assert gone == []
        return
    committed = [one for one in entries if one.managed and one.complete]
    stays = [one for one in committed if one not in gone and not one.pinned]
    reasons = keep.last + keep.best + 1
    assert sum(not (keep.every_steps and one.step % keep.every_steps == 0) for one in stays) <= reasons


@often
@given(folders(), keeps)
def test_the_best_stay_however_many_come_after_them(entries, keep):
    gone = choose_removals(entries, keep)
    committed = [one for one in entries if one.managed and one.complete]
    best = best_first(committed, keep.metric, mode=keep.mode)[: keep.best]
    assert not set(map(id, best)) & set(map(id, gone))


@often
@given(folders(), keeps)
def test_doing_it_again_finds_nothing_more(entries, keep):
    gone = choose_removals(entries, keep)
    assert choose_removals([one for one in entries if one not in gone], keep) == []


@often
@given(folders(), st.sampled_from(["min", "max"]))
def test_the_best_are_in_order_and_nan_is_no_value(entries, mode):
    values = [one.user.metrics["loss"] for one in best_first(entries, "loss", mode=mode)]
    assert values == sorted(values, reverse=mode == "max")
    assert not any(map(math.isnan, values))
