"""Our names and paths are torch's, for any nested state dict."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint._nested_dict import flatten_state_dict, unflatten_state_dict

from ckptd.client.saving.flatten import flatten, outline_of, set_leaf
from ckptd.protocol.errors import Unsupported

keys = st.sampled_from(["a", "b", "a.b", "0", "1", "w"]) | st.integers(0, 1)
leaves = st.one_of(
    st.integers(0, 9),
    st.text(max_size=2),
    st.none(),
    st.builds(torch.zeros, st.integers(0, 2)),
    st.tuples(st.integers(), st.builds(torch.zeros, st.just(1))),
    st.just(()),
)


def state_dicts(keys):
    values = st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3) | st.tuples(inner, inner),
        max_leaves=6,
    )
    return st.dictionaries(keys, values, max_size=3)


@settings(max_examples=100, deadline=None)
@given(state_dicts(keys))
def test_names_paths_and_values_are_torchs(state_dict):
    try:
        theirs, paths = flatten_state_dict(state_dict)
    except ValueError:
        with pytest.raises(Unsupported):
            flatten(state_dict)
        return
    ours = flatten(state_dict)
    assert list(ours) == list(theirs)
    assert {name: path for name, (path, _) in ours.items()} == paths
    assert all(ours[name][1] is value for name, value in theirs.items())


def _names(state_dict):
    try:
        return [(name, path) for name, (path, _) in flatten(state_dict).items()]
    except Unsupported:
        return None


@settings(max_examples=200, deadline=None)
@given(state_dicts(keys), state_dicts(keys))
def test_an_outline_finds_the_leaves_of_its_likes_and_of_nothing_else(one, other):
    outline = outline_of(one)
    if outline is None:
        return
    for state_dict in (one, copy.deepcopy(one), other):
        found = outline.leaves_of(state_dict)
        if found is not None and _names(one) is not None:
            assert _names(state_dict) == _names(one)
            assert all(a is b for a, (_, b) in zip(found, flatten(state_dict).values(), strict=True))
    assert outline.leaves_of(one) is not None


@settings(max_examples=50, deadline=None)
@given(state_dicts(st.sampled_from(["a", "b", "w", 0, 1])))
def test_leaves_go_back_to_where_they_came_from(state_dict):
    try:
        before = flatten(state_dict)
    except Unsupported:
        return
    target = copy.deepcopy(state_dict)
    for number, (path, _) in enumerate(flatten(target).values()):
        set_leaf(target, path, f"leaf {number}")
    replaced = [value for _, value in flatten(_with_tensors(target)).values()]
    assert [int(value.item()) for value in replaced] == list(range(len(before)))


def _with_tensors(value):
    """Put a tensor in place of each numbered leaf, so that lists are walked as they were."""
    if isinstance(value, str) and value.startswith("leaf "):
        return torch.tensor(int(value.removeprefix("leaf ")))
    if isinstance(value, dict):
        return {key: _with_tensors(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_tensors(inner) for inner in value]
    return value


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.sampled_from("abc"), st.dictionaries(st.sampled_from("xyz"), leaves, min_size=1), min_size=1))
def test_torch_puts_our_leaves_together_again(state_dict):
    ours = flatten(state_dict)
    nested = unflatten_state_dict(
        {name: value for name, (_, value) in ours.items()}, {name: path for name, (path, _) in ours.items()}
    )
    assert {key: set(inner) for key, inner in nested.items()} == {key: set(inner) for key, inner in state_dict.items()}
