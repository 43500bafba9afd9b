"""The client in the test's own process, and the library whose place it takes."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
import torch.distributed.checkpoint as stock
from support.nursery import state

import ckptd.client
from ckptd.client.session import sessions


@pytest.fixture
def client(runtime):
    """ckptd.client; its sessions are closed at the end. Name it after ``daemon`` in a test's arguments."""
    yield ckptd.client
    sessions.close_all()
    gc.collect()  # an arena stays mapped until the last view of it is gone


def stock_load(state_dict, path, **options):
    """torch.distributed.checkpoint.load, without its warning that there is no process group."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock.load(state_dict, checkpoint_id=str(path), no_dist=True, **options)


def stock_save(state_dict, path, **options):
    """torch.distributed.checkpoint.save, without its warning that there is no process group."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return stock.save(state_dict, checkpoint_id=str(path), no_dist=True, **options)


def stock_metadata(path):
    """What stock's reader finds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return stock.FileSystemReader(str(path)).read_metadata()


def assert_holds(path, *, mib=1, value=1.0):
    """The checkpoint holds what ``state(mib, value)`` is, for us and for stock."""
    wanted = state(mib, value)
    for load in (lambda target: ckptd.client.load(target, checkpoint_id=str(path)), lambda t: stock_load(t, path)):
        found = state(mib, -1.0)
        load(found)
        assert torch.equal(found["model"]["w"], wanted["model"]["w"])
        assert torch.equal(found["model"]["b"], wanted["model"]["b"])
        assert found["step"] == wanted["step"]
