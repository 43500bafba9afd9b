"""What a user says of a checkpoint: there and back, and what cannot be said."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ckptd.checkpoint.folder.user_data import MOST_BYTES, USER_DATA, UserData, decode_user_data
from ckptd.protocol.errors import Unsupported


def there_and_back(data):
    return decode_user_data({USER_DATA: data.encode(), "version": "1"})


@pytest.mark.parametrize("metadata", [None, 1, "täxt", [1, {"a": None}], {"epoch": 3, "lr": 0.1}])
def test_it_comes_back_as_it_was(metadata):
    data = UserData(7, {"loss": 0.25, "tokens": 10**12}, metadata)
    assert there_and_back(data) == data


def test_numbers_of_torch_and_numpy_are_numbers():
    data = UserData(7, {"loss": torch.tensor(0.5), "acc": np.float32(0.25), "n": np.int64(3)})
    assert there_and_back(data).metrics == {"loss": 0.5, "acc": 0.25, "n": 3.0}


def test_a_metric_that_diverged_is_stored_all_the_same():
    metrics = there_and_back(UserData(7, {"loss": math.nan, "norm": math.inf})).metrics
    assert math.isnan(metrics["loss"])
    assert metrics["norm"] == math.inf


@pytest.mark.parametrize("metadata", [object(), {1, 2}, torch.zeros(2), {"x": b"bytes"}, {("a", 1): 2}])
def test_what_json_cannot_hold_is_refused(metadata):
    with pytest.raises(Unsupported, match="JSON cannot hold"):
        UserData(7, {}, metadata).encode()


@pytest.mark.parametrize("value", ["high", None, torch.zeros(2)])
def test_a_metric_is_one_number(value):
    with pytest.raises(Unsupported, match="metric loss="):
        UserData(7, {"loss": value}).encode()


def test_a_ring_in_it_is_refused():
    ring = []
    ring.append(ring)
    with pytest.raises(Unsupported):
        UserData(7, {}, ring).encode()


def test_it_is_bounded_because_it_travels_in_the_seal():
    assert UserData(7, {}, "x" * (MOST_BYTES - 100)).encode()
    with pytest.raises(Unsupported, match=f"at most {MOST_BYTES}"):
        UserData(7, {}, "ä" * (MOST_BYTES // 4)).encode()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "7",
        "[]",
        "{}",
        '{"step":"7"}',
        '{"step":-1}',
        '{"step":true}',
        '{"step":7,"metrics":[1]}',
        "{",
        "[" * 99,
    ],
)
def test_what_is_not_ours_is_nothing(text):
    assert decode_user_data({USER_DATA: text}) is None
    assert decode_user_data({}) is None
