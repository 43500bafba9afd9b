"""Rows of opcodes do what single opcodes do."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from ckptd.checkpoint.stock.opcodes import Memo, get_each, push_each, push_int, push_text, ragged_rows, rows


def lines(matrix):
    return [line.tobytes() for line in matrix]


@pytest.mark.parametrize("largest", [0, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**61])
def test_a_column_is_pushed_in_one_width(largest):
    column = np.array([0, largest // 2, largest])
    assert [pickle.loads(line + b".") for line in lines(push_each(column))] == column.tolist()


def test_columns_need_not_be_contiguous():
    boxes = np.arange(12).reshape(3, 4)
    assert [pickle.loads(line + b".") for line in lines(push_each(boxes[:, 1]))] == [1, 5, 9]


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
    table = lines(rows([b"(", get_each(np.array([0, 299])), push_each(np.array([1, 2])), b"t"], 2))
    made = b"".join(memo.preamble)
    assert first == 300
    assert pickle.loads(b"\x80\x04" + made + b"(" + b"".join(kept) + b"l.") == [f"text {row}" for row in range(300)]
    assert [pickle.loads(b"\x80\x04" + made + line + b".") for line in table] == [
        ("text 0", 1),
        ("text 299", 2),
    ]
    assert memo.named("builtins", "len") == b"j\x2c\x01\0\0"


def test_no_rows_are_no_bytes():
    assert lines(rows([b"abc", push_each(np.zeros(0, np.int64))], 0)) == []


@pytest.mark.parametrize("long", ["x" * 256, "ä" * 128])
def test_texts_are_kept_in_their_order(long):
    memo = Memo()
    memo.text("before")
    texts = ["a", "", "ä", *(str(row) for row in range(300)), long]
    first = memo.texts(texts)
    short = memo.texts(texts[:-1])
    assert (first, short) == (1, 1 + len(texts))
    fetched = [memo_line.tobytes() for memo_line in get_each(first + np.arange(2 * len(texts) - 1))]
    assert pickle.loads(b"\x80\x04" + b"".join(memo.preamble) + b"(" + b"".join(fetched) + b"l.") == texts + texts[:-1]


def test_values_of_rows_are_kept():
    memo = Memo()
    first = memo.values([push_each(np.array([7, 8])), b"\x85"], 2)
    made = b"\x80\x04" + b"".join(memo.preamble)
    assert [pickle.loads(made + line + b".") for line in lines(get_each(first + np.arange(2)))] == [(7,), (8,)]


def test_a_row_is_without_the_cells_that_it_does_not_have():
    has = np.array([True, False, True])
    cells = [([b"<"], has), ([push_each(np.array([1, 2, 3]))], None), ([b"-", b">"], ~has)]
    assert ragged_rows(cells, 3) == b"<K\x01K\x02->" + b"<K\x03"
    assert ragged_rows([([b"ab"], None), ([b"c"], np.ones(2, np.bool_))], 2) == b"abcabc"
    assert ragged_rows([([b"ab"], np.zeros(0, np.bool_))], 0) == b""
