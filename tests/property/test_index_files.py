"""Whatever happens to an index file, reading it gives the index or BadIndex."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.checkpoints import as_dict, make_checkpoint

from ckptd.checkpoint.indexing.index import decode_index, encode_index, pack_index
from ckptd.checkpoint.stock.metadata_pickle import decode_metadata, encode_metadata
from ckptd.protocol.errors import BadIndex, Unsupported

INDEX, _ = make_checkpoint()
OURS = encode_index(INDEX)
STOCK = encode_metadata(INDEX, checkpoint_id="/a/b", save_id="c")
quick = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def damaged(draw, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(changed) - 1))
        if draw(st.booleans()):
            changed[at] ^= 1 << draw(st.integers(0, 7))
        else:
            changed[at : at + draw(st.integers(0, 5))] = draw(st.binary(max_size=5))
    return bytes(changed)


@quick
@given(damaged(OURS))
def test_a_damaged_index_is_refused(data):
    if data != OURS:
        with pytest.raises(BadIndex):
            decode_index(data, "here")


@settings(quick, max_examples=400)
@given(damaged(STOCK))
def test_damaged_metadata_are_refused_or_still_make_an_index(data):
    try:
        index = decode_metadata(data, "here")
    except (BadIndex, Unsupported):
        return
    decode_index(encode_index(index), "here")


@quick
@given(st.binary(max_size=200))
def test_garbage_is_refused(data):
    for decode in (decode_index, decode_metadata):
        with pytest.raises(BadIndex):
            decode(data, "here")


@quick
@given(st.data())
def test_columns_of_any_integers_are_refused_or_read_as_written(data):
    names = [
        "item_name",
        "item_file",
        "record_offset",
        "record_bytes",
        "data_offset",
        "data_bytes",
        "ndim",
        "dtype",
    ]
    name = data.draw(st.sampled_from([*names, "shape", "item_sizes", "item_offsets"]))
    column = getattr(INDEX, name).copy()
    limits = np.iinfo(column.dtype)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, column.size - 1))
        column.flat[at] = data.draw(st.integers(limits.min, limits.max) | st.integers(max(-3, limits.min), 10))
    changed = dataclasses.replace(INDEX, **{name: column})
    try:
        decoded = decode_index(pack_index(changed), "here")
    except BadIndex:
        return
    assert as_dict(decoded) == as_dict(changed)


@quick
@given(st.dictionaries(st.text(), st.text()), st.lists(st.text(), min_size=7, max_size=7, unique=True))
def test_any_unicode_comes_back(header, names):
    index = dataclasses.replace(INDEX, header=header, names=names)
    decoded = decode_index(encode_index(index), "here")
    assert (decoded.header, decoded.names) == (header, names)
