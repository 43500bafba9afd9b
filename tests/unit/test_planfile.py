"""A plan is made by one worker and read by the others."""

from __future__ import annotations

import numpy as np
import pytest
from support.checkpoints import as_dict
from support.plans import Held, local_plan, rows

from ckptd.checkpoint.planning.plan import make_plan
from ckptd.checkpoint.planning.planfile import load_plan, store_plan
from ckptd.protocol.errors import BadMessage

PLAN = make_plan(
    [
        local_plan({"w": rows(0, 3, of=(8, 4)), "o": 256, "p": 512}),
        local_plan({"w": rows(3, 8, of=(8, 4)), "q": 768, "e": Held((0,))}),
    ]
)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "1.plan")


def column(*lengths: int) -> bytes:
    return np.array(lengths, "<i8").tobytes()


def test_a_plan_is_read_as_it_was_stored(path):
    store_plan(path, PLAN)
    stored = load_plan(path)
    assert as_dict(stored.index) == as_dict(PLAN.index)
    for rank, found in enumerate(stored.ranks):
        assert found.data_offset.tolist() == PLAN.layouts[rank].data_offset.tolist()
        assert found.data_bytes.tolist() == PLAN.layouts[rank].data_bytes.tolist()
        assert found.is_object.tolist() == PLAN.is_object[rank].tolist()
        assert found.index_rows.tolist() == PLAN.index_rows[rank].tolist()


def test_nothing_but_the_plan_is_left(path, tmp_path):
    store_plan(path, PLAN)
    assert [entry.name for entry in tmp_path.iterdir()] == ["1.plan"]


def test_the_lengths_of_objects_take_the_place_of_what_was_reserved(path):
    store_plan(path, PLAN)
    first, second = load_plan(path).ranks
    assert first.true_bytes(column(100, 512)).tolist() == [48, 100, 512]
    assert second.true_bytes(column(0)).tolist() == [80, 0, 0]
    assert first.data_bytes.tolist() == [48, 256, 512]


@pytest.mark.parametrize("lengths", [(), (1,), (1, 2, 3), (257, 1), (1, 513), (-1, 5)])
def test_lengths_that_do_not_fit_are_refused(path, lengths):
    store_plan(path, PLAN)
    with pytest.raises(BadMessage, match="lengths of objects"):
        load_plan(path).ranks[0].true_bytes(column(*lengths))


def test_half_a_length_is_refused(path):
    store_plan(path, PLAN)
    with pytest.raises(BadMessage, match="in 9 bytes"):
        load_plan(path).ranks[0].true_bytes(b"\0" * 9)
