"""A local plan crosses a process border, and a malformed one does not."""

from __future__ import annotations

import dataclasses

import msgspec
import numpy as np
import pytest
from support.plans import Held, local_plan, rows

from ckptd.checkpoint.planning.items import MAX_DIMENSIONS, LocalPlan, decode_plan
from ckptd.protocol.errors import BadMessage

PLAN = local_plan({"w": rows(1, 3, of=(4, 5)), "o": 256, "s": Held((), dtype="int64", requires_grad=True)})
# Positions in the encoded array.
NAMES, PATHS, DIMENSIONS, DTYPE, NDIM, SHAPE, GRAD, ITEM_NAME, OFFSETS, SIZES, CAPACITY = range(1, 12)


def as_dict(plan: LocalPlan) -> dict[str, object]:
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(plan).items()}


@pytest.mark.parametrize("plan", [PLAN, local_plan({})], ids=["some", "empty"])
def test_a_plan_comes_back_as_it_was(plan):
    decoded = decode_plan(plan.encode())
    assert as_dict(decoded) == as_dict(plan)
    assert [column.dtype for column in vars(decoded).values() if isinstance(column, np.ndarray)] == [
        column.dtype for column in vars(plan).values() if isinstance(column, np.ndarray)
    ]


def test_paths_keep_their_kinds():
    plan = dataclasses.replace(PLAN, paths=[("w", 0, "0"), ("o",), (7,)])
    assert decode_plan(plan.encode()).paths == [("w", 0, "0"), ("o",), (7,)]


def test_the_encoded_form_is_a_function_of_the_plan():
    assert decode_plan(PLAN.encode()).encode() == PLAN.encode()


def changed(at: int, value: object) -> bytes:
    fields = msgspec.msgpack.decode(PLAN.encode())
    fields[at] = value
    return msgspec.msgpack.encode(fields)


def longs(*values: int) -> bytes:
    return np.array(values, "<i8").tobytes()


MALFORMED = {
    "not msgpack": b"\xc1",
    "nothing": b"",
    "another message": msgspec.msgpack.encode({"type": "heartbeat"}),
    "cut short": PLAN.encode()[:-1],
    "a name too few": changed(NAMES, ["w", "o"]),
    "a path too few": changed(PATHS, [("w",)]),
    "a path of something else": changed(PATHS, [(1.5,), ("o",), ("s",)]),
    "too many dimensions": changed(DIMENSIONS, MAX_DIMENSIONS + 1),
    "negative dimensions": changed(DIMENSIONS, -1),
    "dimensions that do not fit": changed(DIMENSIONS, 3),
    "a dtype too many": changed(DTYPE, b"\0" * 4),
    "an unknown dtype": changed(DTYPE, b"\0\0\xfe"),
    "ndim beyond the columns": changed(NDIM, b"\3\0\0"),
    "a flag too few": changed(GRAD, b"\0"),
    "half a number": changed(SHAPE, b"\0" * 47),
    "a negative shape": changed(SHAPE, longs(-1, 5, 0, 0, 0, 0)),
    "an item too few": changed(ITEM_NAME, longs(0, 1)),
    "an item of no name": changed(ITEM_NAME, longs(0, 1, 3)),
    "an item before the names": changed(ITEM_NAME, longs(0, -1, 2)),
    "negative offsets": changed(OFFSETS, longs(-1, 0, 0, 0, 0, 0)),
    "negative sizes": changed(SIZES, longs(2, -5, 0, 0, 0, 0)),
    "negative capacity": changed(CAPACITY, longs(0, -256, 0)),
    "a capacity too many": changed(CAPACITY, longs(0, 256, 0, 0)),
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_plan_is_refused(data):
    with pytest.raises(BadMessage):
        decode_plan(data)
