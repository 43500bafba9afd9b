"""Nested state dicts as flat ones; held against torch's own in tests/property."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch

from ckptd.client.saving.flatten import flatten, set_leaf, top_level
from ckptd.protocol.errors import Unsupported

T = torch.ones(2)


def names(state_dict):
    return {name: path for name, (path, _) in flatten(state_dict).items()}


def test_keys_are_joined_by_dots_and_paths_keep_the_steps():
    state = {"model": {"w": T, "deep": {"b": T}}, "epoch": 7}
    assert names(state) == {
        "model.w": ("model", "w"),
        "model.deep.b": ("model", "deep", "b"),
        "epoch": ("epoch",),
    }
    assert flatten(state)["model.w"][1] is T


def test_a_list_is_walked_only_where_a_tensor_or_mapping_is_in_it():
    state = {"plain": [1, [2, 3]], "tensors": [1, T], "maps": [{"a": 1}], "deep": [1, [T]], "empty": [], "nest": [[]]}
    assert names(state) == {
        "plain": ("plain",),
        "tensors.0": ("tensors", 0),
        "tensors.1": ("tensors", 1),
        "maps.0.a": ("maps", 0, "a"),
        "deep.0": ("deep", 0),
        "deep.1.0": ("deep", 1, 0),
        "empty": ("empty",),
        "nest": ("nest",),
    }


def test_tuples_are_leaves():
    assert names({"t": (T, T)}) == {"t": ("t",)}


def test_empty_mappings_leave_nothing():
    assert names({"a": {}, "b": {"c": {}}}) == {}


def test_keys_that_are_no_text_are_spelt():
    assert names({"state": {0: {"step": 1}, (1, 2): T}}) == {
        "state.0.step": ("state", "0", "step"),
        "state.(1, 2)": ("state", "(1, 2)"),
    }


@pytest.mark.parametrize(
    "state",
    [{"a.b": 1, "a": {"b": 2}}, {"a": {1: 1, "1": 2}}, {"l": [T, T], "l.1": 3}, {"a": {"b.c": 1, "b": {"c": 1}}}],
)
def test_two_paths_of_one_name_are_refused(state):
    with pytest.raises(Unsupported, match="twice in one state dict"):
        flatten(state)


def test_the_top_level_is_taken_as_it_is():
    inner = {"w": T}
    assert top_level({"a.b": inner, 5: [T]}) == {"a.b": (("a.b",), inner), "5": (("5",), [T])}
    with pytest.raises(Unsupported, match="twice"):
        top_level({5: 1, "5": 2})


class TestSetLeaf:
    def test_every_leaf_can_be_put_back(self):
        state = {"a": {"b": [1, {"c": 2}], 3: {"d": 4}}, "e": OrderedDict(f=5), "t": [T, 6]}
        for position, (path, _) in enumerate(flatten(state).values()):
            set_leaf(state, path, position * 100)
        assert state == {"a": {"b": [0, {"c": 100}], 3: {"d": 200}}, "e": OrderedDict(f=300), "t": [400, 500]}

    def test_a_key_that_is_new_is_added_as_text(self):
        state = {"a": {1: "one"}}
        set_leaf(state, ("a", "2"), "two")
        assert state == {"a": {1: "one", "2": "two"}}

    def test_text_comes_before_what_is_only_spelt_alike(self):
        state = {"a": {1: "number", "1": "text"}}
        set_leaf(state, ("a", "1"), "new")
        assert state == {"a": {1: "number", "1": "new"}}
