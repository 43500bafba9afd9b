"""Steps in names, and the newest of several checkpoints."""

from __future__ import annotations

import pytest
from support.managed import entry

from ckptd.checkpoint.folder.steps import newest_first, step_name, step_of
from ckptd.checkpoint.names import (
    hidden_directory,
    is_checkpoint_file,
    is_removed,
    removed_directory,
    unfinished_save,
)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step-1000", 1000),
        ("step_1000", 1000),
        ("1000", 1000),
        ("step-0001000", 1000),
        ("step1000", 1000),
        ("global_step1000", 1000),
        ("iter_0000007", 7),
        ("checkpoint-5", 5),
        ("step-0", 0),
    ],
)
def test_a_step_is_found_in_a_name_zero_padded_or_not(name, step):
    assert step_of(name) == step


@pytest.mark.parametrize(
    "name", ["", "final", "step-", "step-10-broken", "2026-01-02", "step-1.5", "-5", "step-٣", ".step-1", "9" * 19]
)
def test_other_names_tell_no_step(name):
    assert step_of(name) is None


@pytest.mark.parametrize("step", [0, 7, 123456])
def test_a_managers_own_names_tell_their_step(step):
    assert step_of(step_name(step)) == step


def test_the_step_decides_and_then_the_commit():
    found = [
        entry(9, committed_s=50),
        entry(10, committed_s=1),
        entry(None, name="final", committed_s=99),
        entry(None, name="older", committed_s=98),
        entry(9, name="step_009", committed_s=51),
    ]
    assert [one.name for one in newest_first(found)] == ["step-10", "step_009", "step-9", "final", "older"]


def test_hidden_names_tell_what_they_are():
    save = hidden_directory("/runs/step-7", "job_a-1-2-0123abcd").rpartition("/")[2]
    removed = removed_directory("/runs/step-7", "0123abcd").rpartition("/")[2]
    assert (unfinished_save(save), is_removed(save)) == ("step-7", False)
    assert (unfinished_save(removed), is_removed(removed)) == (None, True)
    assert [unfinished_save(name) for name in ("step-7", ".git", ".pinned", ".ckptd")] == [None] * 4
    assert not is_checkpoint_file(".pinned")
