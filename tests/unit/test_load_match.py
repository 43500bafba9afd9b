"""Keys of a state dict against those of a checkpoint: what fits, what is let pass, what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from support.checkpoints import make_checkpoint, many_items

from ckptd.client.loading.match import LoadRules, match
from ckptd.client.loading.report import Difference
from ckptd.client.saving.flatten import flatten, top_level
from ckptd.protocol.errors import Mismatch, MissingKeys, Unsupported

INDEX, _ = make_checkpoint()


def matched(state, *, index=INDEX, **rules):
    return match("/ckpt", index, flatten(state), rules=LoadRules(**rules))


def holding(state):
    """Return an index that holds objects under the names of a state dict."""
    leaves = flatten(state)
    few = many_items(len(leaves))
    nothing = np.zeros((len(leaves), 0), np.int64)
    return dataclasses.replace(
        few,
        names=list(leaves),
        paths=[path for path, _ in leaves.values()],
        dtype=np.full(len(leaves), 255, np.uint8),
        ndim=np.zeros(len(leaves), np.uint8),
        **dict.fromkeys(("shape", "item_offsets", "item_sizes"), nothing),
    )


class TestKeys:
    def test_what_is_there_is_loaded_in_the_state_dicts_order(self):
        found = matched({"epoch": 0, "model": {"b": torch.zeros(300, dtype=torch.bfloat16), "w": torch.zeros(4, 6)}})
        assert found.names == ["epoch", "model.b", "model.w"]
        assert [INDEX.names[row] for row in found.rows] == found.names

    def test_what_nobody_asked_for_is_told_and_no_error(self):
        found = matched({"model": {"w": torch.zeros(4, 6)}})
        assert found.unexpected == ["model.b", "model.step", "model.deep", "model.empty", "epoch", "list.0.nämé"]

    def test_missing_keys_are_counted_and_the_first_is_told(self):
        with pytest.raises(MissingKeys) as caught:
            matched({"epoch": 0, "no": 1, "nor": 2})
        assert (caught.value.count, caught.value.first, caught.value.path) == (2, "no", "/ckpt")
        assert str(caught.value).startswith("Missing key in checkpoint state_dict: no")

    @pytest.mark.parametrize("rules", [{"partial": True}, {"strict": False}])
    def test_or_left_alone_where_a_part_will_do(self, rules):
        found = matched({"epoch": 0, "no": 1}, **rules)
        assert (found.names, found.missing) == (["epoch"], ["no"])


MISFITS = [
    (
        {"model": {"w": torch.zeros(4, 7)}},
        "model.w: the state dict wants shape (4, 7), the checkpoint holds shape (4, 6)",
    ),
    (
        {"model": {"w": torch.zeros(24)}},
        "model.w: the state dict wants shape (24,), the checkpoint holds shape (4, 6)",
    ),
    (
        {"model": {"w": 5}},
        "model.w: the state dict wants an object of type int, the checkpoint holds a tensor of shape (4, 6)",
    ),
    ({"epoch": torch.zeros(())}, "epoch: the state dict wants shape (), the checkpoint holds an object"),
]


class TestWhatDoesNotFit:
    @pytest.mark.parametrize(("state", "told"), MISFITS)
    def test_is_told_by_key(self, state, told):
        with pytest.raises(Mismatch) as caught:
            matched(state)
        assert str(caught.value) == told

    @pytest.mark.parametrize(("state", "told"), MISFITS)
    def test_is_left_alone_and_reported_where_nobody_insists(self, state, told):
        found = matched(state, strict=False)
        [other] = found.mismatched
        assert found.names == []
        wanted = f"{other.name}: the state dict wants {other.wanted}, the checkpoint holds {other.stored}"
        assert wanted == told

    def test_missing_keys_may_pass_while_shapes_must_fit(self):
        with pytest.raises(Mismatch):
            matched({"no": 1, "model": {"w": torch.zeros(4, 7)}}, partial=True)


DOUBLES = {"model": {"w": torch.zeros(4, 6, dtype=torch.float64)}}
DOUBLES_TOLD = Difference("model.w", "dtype torch.float64", "dtype torch.float32")


class TestAnotherDtype:
    def test_is_converted_and_reported(self):
        found = matched(DOUBLES)
        assert (found.names, found.converted, found.mismatched) == (["model.w"], [DOUBLES_TOLD], [])

    def test_is_refused_on_request(self):
        with pytest.raises(Mismatch, match=r"wants dtype torch.float64, the checkpoint holds dtype torch.float32"):
            matched(DOUBLES, convert_dtype=False)

    def test_is_left_alone_where_nobody_insists(self):
        found = matched(DOUBLES, convert_dtype=False, strict=False)
        assert (found.names, found.converted, found.mismatched) == ([], [], [DOUBLES_TOLD])


class TestStrictByPrefix:
    @pytest.mark.parametrize(
        ("strict", "name", "is_strict"),
        [
            (True, "a.b", True),
            (False, "a.b", False),
            ({}, "a.b", True),
            ({"": False}, "a.b", False),
            ({"a": False}, "a.b", False),
            ({"a.": False}, "a.b", False),
            ({"a": False}, "a", False),
            ({"a": False}, "ab", True),
            ({"layers.1": False}, "layers.10.w", True),
            ({"a": False, "a.b": True}, "a.b.c", True),
            ({"a": True, "a.b": False}, "a.b.c", False),
            ({"a": True, "a.b": False}, "a.c.b", True),
            ({"": False, "a": True}, "a.b", True),
        ],
    )
    def test_the_longest_prefix_of_whole_steps_wins(self, strict, name, is_strict):
        assert LoadRules(strict=strict).is_strict(name) is is_strict

    def test_only_strict_keys_are_refused(self):
        state = {"model": {"new": 1, "w": torch.zeros(1)}, "no": 2}
        with pytest.raises(MissingKeys) as caught:
            matched(state, strict={"model": False})
        assert (caught.value.count, caught.value.first) == (1, "no")
        found = matched(state, strict={"model": False, "no": False})
        assert (found.missing, [other.name for other in found.mismatched]) == (["model.new", "no"], ["model.w"])

    @pytest.mark.parametrize("strict", [None, "model", {"a": "no"}, 0])
    def test_anything_else_is_refused(self, strict):
        with pytest.raises(Unsupported, match="strict="):
            LoadRules(strict=strict)


STEPPED = {"step": 1, "exp_avg": 2, "exp_avg_sq": 3}
GROUPS = [{"lr": 0.1}]


class TestOptimizerStateThatNeverExisted:
    """Frozen and unused parameters have none; a part of it is a damaged checkpoint."""

    def absent(self, stored, wanted, **rules):
        index = holding(stored)
        found = match("/ckpt", index, flatten(wanted), rules=LoadRules(**rules))
        return found.absent_optimizer_state

    @pytest.mark.parametrize("key", ["optimizer", "optim", "opt", "adam"])
    def test_is_allowed_and_reported(self, key):
        stored = {key: {"state": {"a.w": STEPPED}, "param_groups": GROUPS}}
        wanted = {key: {"state": {"a.w": STEPPED, "b.w": STEPPED}, "param_groups": GROUPS}}
        assert self.absent(stored, wanted) == [f"{key}.state.b.w.{entry}" for entry in STEPPED]

    def test_is_allowed_before_the_first_step(self):
        stored = {"optim": {"state": {}, "param_groups": GROUPS}}
        wanted = {"optim": {"state": {"w": STEPPED}, "param_groups": GROUPS}}
        assert len(self.absent(stored, wanted)) == 3

    def test_is_found_without_parameter_groups_in_what_is_named_an_optimizer(self):
        stored = {"optim": {"state": {"a": STEPPED}}}
        wanted = {"optim": {"state": {"a": STEPPED, "b": STEPPED}}}
        assert len(self.absent(stored, wanted)) == 3

    def test_is_found_in_an_optimizers_own_state_dict(self):
        stored = {"state": {0: STEPPED}, "param_groups": GROUPS}
        wanted = {"state": {0: STEPPED, 1: STEPPED}, "param_groups": GROUPS}
        assert self.absent(stored, wanted) == ["state.1.step", "state.1.exp_avg", "state.1.exp_avg_sq"]

    def test_is_found_deep_down_and_with_nested_entries(self):
        stored = {"trainer": {"opt": {"state": {"a": {"shampoo": {"left": 1}}}, "param_groups": GROUPS}}}
        wanted = {"trainer": {"opt": {"state": {p: {"shampoo": {"left": 1}} for p in "ab"}, "param_groups": GROUPS}}}
        assert self.absent(stored, wanted) == ["trainer.opt.state.b.shampoo.left"]

    def test_is_found_in_a_flat_state_dict(self):
        stored = {"optim": {"state.a.w.exp_avg": 1, "param_groups.a.w.lr": 0.1}}
        wanted = {"optim": {"state.a.w.exp_avg": 1, "state.b.w.exp_avg": 1, "param_groups.a.w.lr": 0.1}}
        assert self.absent(stored, wanted) == ["optim.state.b.w.exp_avg"]
        index = holding(stored)
        leaves = top_level({f"optim.{key}": value for key, value in wanted["optim"].items()})
        assert match("/ckpt", index, leaves, rules=LoadRules()).absent_optimizer_state == ["optim.state.b.w.exp_avg"]

    def test_a_part_of_a_parameters_state_is_an_error(self):
        stored = {"optim": {"state": {"w": {"step": 1, "exp_avg": 2}}, "param_groups": GROUPS}}
        wanted = {"optim": {"state": {"w": STEPPED}, "param_groups": GROUPS}}
        with pytest.raises(MissingKeys) as caught:
            self.absent(stored, wanted)
        assert (caught.value.count, caught.value.first) == (1, "optim.state.w.exp_avg_sq")
        found = match("/ckpt", holding(stored), flatten(wanted), rules=LoadRules(strict=False))
        assert (found.missing, found.absent_optimizer_state) == (["optim.state.w.exp_avg_sq"], [])

    def test_a_checkpoint_without_the_optimizer_is_an_error(self):
        wanted = {"w": 1, "optim": {"state": {"w": STEPPED}, "param_groups": GROUPS}}
        with pytest.raises(MissingKeys, match=r"optim.state.w.step \(4 in all"):
            self.absent({"w": 1}, wanted)

    def test_a_module_that_is_called_state_is_no_optimizer(self):
        stored = {"model": {"state": {"encoder": {"weight": 1}}}}
        wanted = {"model": {"state": {"encoder": {"weight": 1}, "decoder": {"weight": 1}}}}
        with pytest.raises(MissingKeys, match=r"model.state.decoder.weight"):
            self.absent(stored, wanted)
