"""What a load says of itself."""

from __future__ import annotations

import dataclasses

import pytest

from ckptd.client.loading.report import Difference, LoadReport


def test_a_plain_load_is_one_short_line():
    report = LoadReport(path="/ckpt", loaded=3, needed_bytes=10, read_bytes=2_500_000, seconds=0.25)
    assert str(report) == "loaded 3 keys from /ckpt: 2.5 MB from disk in 0.250 s"
    assert report.complete


def test_every_kind_of_key_is_told_and_long_lists_are_cut():
    report = LoadReport(
        path="/ckpt",
        loaded=0,
        source="memory",
        missing=("a", "b", "c", "d"),
        unexpected=("e",),
        mismatched=(Difference("f", "shape (1,)", "shape (2,)"),),
        converted=(Difference("g", "dtype torch.float64", "dtype torch.float32"),),
        absent_optimizer_state=("h",),
    )
    assert str(report).split("; ") == [
        "loaded 0 keys from /ckpt: 0.0 MB from memory in 0.000 s",
        "4 missing: a, b, c, ...",
        "1 unexpected: e",
        "1 mismatched: f (wanted shape (1,), stored shape (2,))",
        "1 converted: g (wanted dtype torch.float64, stored dtype torch.float32)",
        "1 without optimizer state: h",
    ]


@pytest.mark.parametrize(
    ("kind", "complete"),
    [("missing", False), ("mismatched", False), ("unexpected", True), ("converted", True)],
)
def test_a_load_is_complete_unless_keys_were_left_out(kind, complete):
    report = LoadReport(path="/ckpt", loaded=0)
    assert dataclasses.replace(report, **{kind: ("key",)}).complete is complete
