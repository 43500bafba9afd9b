"""One look at a state dict."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict

import numpy as np
import pytest
import torch
from support.meshes import as_rank, dtensor
from torch.distributed.tensor import Shard

from ckptd.client.saving.snapshot import Snapshot, make_local_plan, object_bytes, state_of, take_snapshot
from ckptd.protocol.errors import Unsupported


def snap(state, capacities=None, *, flat=False):
    last = Snapshot((), [], [], [], [], capacities) if capacities else None
    return take_snapshot(state, last=last, flat=flat)


def plan_of(state, capacities=None, *, flat=False) -> bytes:
    return make_local_plan(snap(state, capacities, flat=flat), settings="s").encode()


W = torch.ones(2, 3)
STATES = {
    "a tensor": {"w": W},
    "another name": {"v": W},
    "another shape": {"w": torch.ones(3, 2)},
    "another dtype": {"w": W.double()},
    "a gradient": {"w": torch.ones(2, 3, requires_grad=True)},
    "one more": {"w": W, "v": W},
    "the other way round": {"v": W, "w": W},
    "an object": {"w": 5},
    "a larger object": {"w": "x" * 5000},
    "nested": {"w": {"v": W}},
    "a name with a dot": {"w.v": W},
    "a list": {"w": [W]},
    "a mapping that looks like a list": {"w": {"0": W}},
    "nothing": {},
    "0-d": {"w": torch.tensor(1.0)},
}


def test_structures_are_equal_if_and_only_if_plans_are():
    for one in STATES.values():
        for other in STATES.values():
            same = snap(one).structure == snap(other).structure
            assert same == (plan_of(one) == plan_of(other)) == (one is other)


def test_other_values_have_the_same_structure():
    one = {"w": torch.ones(2, 3), "step": 5, "text": "one", "none": None}
    other = {"w": torch.zeros(2, 3), "step": 6, "text": "two", "none": 7.5}
    assert snap(one).structure == snap(other).structure
    assert plan_of(one) == plan_of(other)


def test_a_parameter_is_planned_as_the_tensor_it_is():
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    assert plan_of({"w": parameter}) == plan_of({"w": torch.ones(2, 3, requires_grad=True)})


def test_sources_are_in_the_order_of_the_plans_items_and_are_the_tensors_themselves():
    state = {"w": W, "o": {"step": 7, "v": [W * 2]}, "e": torch.empty(0)}
    snapshot = snap(state)
    plan = make_local_plan(snapshot, settings="s")
    assert plan.items == len(snapshot.sources) == 4
    assert [plan.names[name] for name in plan.item_name] == ["w", "o.step", "o.v.0", "e"]
    assert snapshot.sources[0].data_ptr() == W.data_ptr()
    assert snapshot.sources[1] == object_bytes(7)


def test_a_rank_that_holds_nothing_of_a_tensor_still_names_it():
    with as_rank(3, 4):
        state = {"none": dtensor(torch.ones(0, 4), (3, 4), [Shard(0)], (4,)), "w": W}
        snapshot = snap(state)
        plan = make_local_plan(snapshot, settings="s")
    assert plan.names == ["none", "w"]
    assert plan.item_name.tolist() == [1]
    assert len(snapshot.sources) == 1


def test_the_plan_says_what_the_tensors_are():
    plan = make_local_plan(snap({"w": torch.nn.Parameter(W), "o": 5, "s": torch.tensor(3)}), settings="settings")
    assert plan.settings == "settings"
    assert plan.ndim.tolist() == [2, 0, 0]
    assert plan.shape.tolist() == [[2, 3], [0, 0], [0, 0]]
    assert plan.requires_grad.tolist() == [1, 0, 0]
    assert plan.capacity.tolist()[1] > 0
    assert plan.capacity.tolist()[::2] == [0, 0]


class TestRoomForObjects:
    @staticmethod
    def capacity(value, before=0):
        return snap({"o": value}, {"o": before}).capacities["o"]

    def test_it_has_a_quarter_to_spare_in_steps_of_256(self):
        length = len(object_bytes("x" * 1000))
        capacity = self.capacity("x" * 1000)
        assert capacity % 256 == 0
        assert length * 5 // 4 <= capacity < length * 5 // 4 + 256

    def test_it_stays_while_the_object_fits_and_is_not_far_smaller(self):
        room = self.capacity("x" * 4000)
        for length in (4000, 4800, 3000, 1000):
            assert self.capacity("x" * length, room) == room

    def test_it_grows_when_the_object_no_longer_fits(self):
        room = self.capacity("x")
        assert self.capacity("x" * room, room) > room

    def test_it_shrinks_when_most_of_it_is_idle(self):
        room = self.capacity("x" * 40_000)
        assert self.capacity("x", room) == self.capacity("x")

    def test_a_step_count_never_changes_the_structure(self):
        before, capacities = None, {}
        for step in (0, 1, 255, 256, 65_536, 2**31, 2**40, 2**63):
            snapshot = snap({"step": step}, capacities)
            assert before in {None, snapshot.structure}
            before, capacities = snapshot.structure, snapshot.capacities

    def test_names_that_are_gone_are_forgotten(self):
        assert snap({"b": 1}, {"a": 512, "b": 512}).capacities == {"b": 512}


class Custom:
    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return type(other) is Custom and other.value == self.value

    __hash__ = None


class TestObjects:
    @pytest.mark.parametrize(
        "value",
        [
            5,
            1.5,
            "text",
            None,
            True,
            [1, "a"],
            (torch.ones(2), 3),
            OrderedDict(a=1),
            Custom(7),
            b"bytes",
            np.float64(2),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_torch_loads_their_bytes(self, value):
        loaded = torch.load(io.BytesIO(object_bytes(value)), weights_only=False)
        assert type(loaded) is type(value)
        assert str(loaded) == str(value) if isinstance(value, tuple) else loaded == value

    def test_they_are_taken_at_once(self):
        history = [1, 2]
        snapshot = snap({"history": history})
        history.append(3)
        assert torch.load(io.BytesIO(snapshot.sources[0]), weights_only=False) == [1, 2]

    def test_one_that_cannot_be_pickled_is_refused_by_key(self):
        with pytest.raises(Unsupported, match=r"trainer\.lock: a lock that cannot be pickled"):
            snap({"trainer": {"lock": threading.Lock()}})


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: torch.eye(3).to_sparse(), "sparse"),
        (lambda: torch.empty(3, device="meta"), "meta"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "quantized"),
    ],
)
def test_a_tensor_without_plain_bytes_is_refused_by_key(make, told):
    with pytest.raises(Unsupported, match=f"model.w: a .*{told}"):
        snap({"model": {"w": make()}})


class Stateful:
    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def test_stateful_values_are_asked_for_their_state():
    state = {"model": Stateful({"w": W}), "step": 3}
    assert state_of(state) == {"model": {"w": W}, "step": 3}
    assert list(snap(state).leaves) == ["model.w", "step"]


def test_a_flat_look_takes_the_top_level_as_it_is():
    snapshot = snap({"a.b": W, "inner": {"w": W}}, flat=True)
    assert list(snapshot.leaves) == ["a.b", "inner"]
    assert isinstance(snapshot.sources[1], bytes)


def test_devices_are_those_of_accelerators():
    assert snap({"w": W, "o": 1}).devices() == set()


class TestASecondLook:
    """It is shorter, and sees the same."""

    @pytest.mark.parametrize("before", STATES.values(), ids=STATES)
    @pytest.mark.parametrize("after", STATES.values(), ids=STATES)
    def test_whatever_has_changed_is_seen(self, before, after):
        last = snap(before).forget()
        again, fresh = take_snapshot(after, last=last), snap(after, last.capacities)
        assert again.structure == fresh.structure
        assert again.names == fresh.names
        assert [type(source) for source in again.sources] == [type(source) for source in fresh.sources]

    def test_new_tensors_of_the_same_shape_are_the_ones_that_are_staged(self):
        last = snap({"w": torch.zeros(3), "n": {"step": 1}}).forget()
        new = torch.ones(3)
        again = take_snapshot({"w": new, "n": {"step": 2}}, last=last)
        assert again.structure is last.structure
        assert again.sources[0].data_ptr() == new.data_ptr()
        assert again.sources[1] == object_bytes(2)

    def test_what_is_kept_for_it_holds_no_value(self):
        last = snap({"w": torch.zeros(3), "o": [1, 2]}).forget()
        assert (last.values, last.sources) == ([], [])

    def test_a_tensor_that_became_sharded_is_seen(self):
        last = snap({"w": torch.zeros(2, 3)}).forget()
        with as_rank(0, 2):
            sharded = {"w": dtensor(torch.zeros(1, 3), (2, 3), [Shard(0)], (2,))}
            assert take_snapshot(sharded, last=last).structure == snap(sharded).structure != last.structure

    @pytest.mark.parametrize(
        "bad", [torch.ones(2, 3).to_sparse(), torch.ones(2, 3, device="meta")], ids=["sparse", "meta"]
    )
    def test_a_tensor_that_cannot_be_saved_is_refused_then_too(self, bad):
        last = snap({"w": torch.zeros(2, 3)}).forget()
        with pytest.raises(Unsupported, match="w: "):
            take_snapshot({"w": bad}, last=last)
