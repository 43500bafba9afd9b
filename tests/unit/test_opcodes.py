"""Rows of opcodes do what single opcodes do."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from ckptd.checkpoint.opcodes import Memo, get_each, push_each, push_int, push_text, rows, split


@pytest.mark.parametrize("largest", [0, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**61])
def test_a_column_is_pushed_in_one_width(largest):
    column = np.array([0, largest // 2, largest])
    lines = split(push_each(column))
    assert len({len(line) for line in lines}) == 1
    assert [pickle.loads(line + b".") for line in lines] == column.tolist()


def test_columns_need_not_be_contiguous():
    boxes = np.arange(12).reshape(3, 4)
    assert [pickle.loads(line + b".") for line in split(push_each(boxes[:, 1]))] == [1, 5, 9]


@pytest.mark.parametrize("value", [0, 255, 256, -1, 2**40, -(2**63)])
def test_integers(value):
    assert pickle.loads(push_int(value) + b".") == value


@pytest.mark.parametrize("text", ["", "ä" * 127, "ä" * 128, "x" * 70_000])
def test_texts(text):
    assert pickle.loads(push_text(text) + b".") == text


def test_what_is_kept_is_fetched():
    memo = Memo()
    kept = [memo.text(f"text {row}") for row in range(300)]
    first = memo.put(0)
    table = split(rows([b"(", get_each(np.array([0, 299])), push_each(np.array([1, 2])), b"t"], 2))
    made = b"".join(memo.preamble)
    assert first == 300
    assert pickle.loads(b"\x80\x04" + made + b"(" + b"".join(kept) + b"l.") == [f"text {row}" for row in range(300)]
    assert [pickle.loads(b"\x80\x04" + made + line + b".") for line in table] == [
        ("text 0", 1),
        ("text 299", 2),
    ]
    assert memo.named("builtins", "len") == b"j\x2c\x01\0\0"


def test_no_rows_are_no_bytes():
    assert split(rows([b"abc", push_each(np.zeros(0, np.int64))], 0)) == []
