"""Tables of strings come back as they were."""

from __future__ import annotations

import numpy as np
import pytest

from ckptd.checkpoint.indexing.texts import pack_texts, unpack_texts, with_room

TABLES = {
    "none": [],
    "one that is empty": [""],
    "empty ones": ["", "", "a", ""],
    "plain": ["model.weight", "b", "model.bias"],
    "not ASCII": ["ä", "", "日本", "a", "\U0001f600"],
    "a NUL": ["a\0b", "c"],
    "every separator": ["\0", "\n", "\x1f", "\x7f", "ä"],
    "a thousand": [str(row) * (row % 7) for row in range(1000)],
}


@pytest.mark.parametrize("texts", TABLES.values(), ids=TABLES)
def test_what_is_packed_is_unpacked(texts):
    blob, ends = pack_texts(texts)
    assert blob.tobytes() == "".join(texts).encode()
    assert unpack_texts(blob, ends) == texts


@pytest.mark.parametrize("separators", ["", "\0\n\x1f\x7f"])
def test_a_string_that_ends_within_a_character_is_refused(separators):
    blob, ends = pack_texts([f"ä{separators}", "b"])
    with pytest.raises(UnicodeDecodeError):
        unpack_texts(blob, np.array([1, ends[-1]]))


def test_a_string_that_is_not_unicode_is_refused():
    with pytest.raises(UnicodeEncodeError):
        pack_texts(["a", "\ud800"])


def test_room_is_made_around_each_string():
    room, begins = with_room(*pack_texts(["ab", "", "c"]), before=2, behind=1)
    assert begins.tolist() == [2, 7, 10]
    assert len(room) == 3 + 3 * 3
    assert room[[2, 3, 10]].tobytes() == b"abc"
