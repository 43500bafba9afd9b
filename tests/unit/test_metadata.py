"""Index and torch's metadata objects say the same."""

from __future__ import annotations

import gc
import pickle

import pytest
import torch
from support.checkpoints import make_checkpoint, many_items
from torch.distributed.checkpoint.metadata import StorageMeta

from ckptd.checkpoint.stock.metadata import dtype_code, to_metadata, torch_dtype
from ckptd.checkpoint.stock.metadata_pickle import encode_metadata
from ckptd.protocol.errors import Unsupported
from ckptd.staging.dtypes import DTYPES, OBJECT


def test_the_objects_are_those_that_stock_reads():
    index, _ = make_checkpoint()
    theirs = encode_metadata(index, checkpoint_id="/tmp/some/where", save_id="a save")
    assert to_metadata(index) == pickle.loads(theirs)
    assert gc.isenabled()


def test_an_index_that_does_not_know_its_origin_has_none():
    assert to_metadata(many_items(1)).storage_meta == StorageMeta()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_codes_and_torchs_dtypes_are_one_to_one(dtype):
    assert torch_dtype(dtype.code) is getattr(torch, dtype.name)
    assert dtype_code(getattr(torch, dtype.name)) == dtype.code


def test_others_are_unsupported():
    with pytest.raises(Unsupported, match=r"torch\.qint8"):
        dtype_code(torch.qint8)
    with pytest.raises(Unsupported, match="255"):
        torch_dtype(OBJECT)
