"""Plain values are read without torch; everything else is left to it, and nothing is run."""

from __future__ import annotations

import collections
import io
import os
import pathlib

import pytest
import torch

from ckptd.checkpoint.formats.objects import object_record, object_value, same_objects
from ckptd.checkpoint.formats.plain import plain_value
from ckptd.protocol.errors import BadFile, Unsupported

PLAIN = [
    *[7, -(1 << 80), 0.1, "text ü", True, None, b"\x00\xff", (1, (2, "x")), [1, [2.5, None]], {"a": {1: [2]}}],
    *[{1, 2}, frozenset({3}), collections.OrderedDict(a=1), [], {}, ()],
]


def record(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_plain_values_are_what_torch_says(value):
    for data in (record(value), object_record(value, "x")):
        known, found = plain_value(data)
        assert known
        assert found == value == torch.load(io.BytesIO(data), weights_only=False)
        assert type(found) is type(value)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("/tmp/should-not-be",)


@pytest.mark.parametrize(
    "data",
    [
        record(pathlib.PurePosixPath("/a")),
        record(torch.ones(1)),
        record((1, torch.ones(1))),
        record(Evil()),
        record("x" * 20_000),
        record([1])[:-40],
        b"",
        b"no archive",
    ],
)
def test_all_else_is_not_plain(data):
    assert plain_value(data) == (False, None)
    assert not os.path.exists("/tmp/should-not-be")


def test_torch_is_asked_for_the_rest():
    assert torch.equal(object_value(record((torch.ones(2),)), "x", "file", trust=False)[0], torch.ones(2))
    with pytest.raises(BadFile, match="file: x: its pickle names classes"):
        object_value(record(Evil()), "x", "file", trust=False)
    with pytest.raises(BadFile, match="file: x: it cannot be"):
        object_value(b"garbage", "x", "file", trust=True)


def test_what_cannot_be_pickled_is_named():
    with pytest.raises(Unsupported, match="key: a function that cannot be pickled"):
        object_record(lambda: 0, "key")


def test_records_are_the_same_if_their_content_is():
    assert same_objects(record(7), object_record(7, "x"))
    assert same_objects(record(torch.ones(2)), record(torch.ones(2)))
    assert not same_objects(record(7), record(8))
    assert not same_objects(record(torch.ones(2)), record(torch.zeros(2)))
    assert not same_objects(record(7), b"garbage")
    assert same_objects(b"garbage", b"garbage")
