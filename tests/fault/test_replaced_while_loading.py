"""A checkpoint that is replaced while it is loaded: what comes is the old one or the new one, never parts of both."""

from __future__ import annotations

import importlib
import shutil

import pytest
import torch
from support.clients import stock_save
from support.waiting import wait_until
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from ckptd.checkpoint.reading.files import Disk, DiskFile
from ckptd.client.loading import nodecache
from ckptd.client.loading.plan import LoadPlanner
from ckptd.protocol.errors import MissingFile, Unsupported, WrongBits

load_module = importlib.import_module("ckptd.client.loading.load")  # the package's name for it is the function's
# Rows so long that five columns are read row by row: of what is read in part, the hash cannot be known.
ROWS, COLUMNS = 8, 16384


def whole(value):
    """What is saved."""
    return {f"w{n}": torch.full((ROWS, COLUMNS), value) for n in range(4)}


class Columns(torch.Tensor):
    """A tensor of which this process wants five columns, ``shard``."""

    def __create_chunk_list__(self):
        return [ChunkStorageMetadata(offsets=torch.Size([0, 20]), sizes=torch.Size([ROWS, 5]))]

    def __get_tensor_shard__(self, index):
        return self.shard


def parts():
    """Targets for some columns of each tensor."""
    made = {name: torch.empty(ROWS, COLUMNS).as_subclass(Columns) for name in whole(0.0)}
    for value in made.values():
        value.shard = torch.zeros(ROWS, 5)
    return made


def found_in(made):
    """The distinct values that were loaded."""
    return torch.stack([value.shard if hasattr(value, "shard") else value for value in made.values()]).unique().tolist()


class Hook:
    """Runs something the first so many times that a function is called, before or after it."""

    def __init__(self, monkeypatch, owner, name, what, *, times=1, after=False):
        real, self.calls = getattr(owner, name), 0

        def hooked(*args, **kwargs):
            if self.calls >= times:
                return real(*args, **kwargs)
            self.calls += 1
            if not after:
                what()
            result = real(*args, **kwargs)
            if after:
                what()
            return result

        monkeypatch.setattr(owner, name, hooked)


MOMENTS = {
    "the index is read": (load_module, "read_index", True),
    "the plan is made": (LoadPlanner, "plan", True),
    "a file is opened": (Disk, "open", True),
    "a file is read": (DiskFile, "fill_rows", False),
}
moments = pytest.mark.parametrize("moment", MOMENTS)


@moments
def test_a_commit_in_the_middle_of_a_load_of_parts_mixes_nothing(daemon, client, tmp_path, monkeypatch, moment):
    client.save(whole(1.0), checkpoint_id=tmp_path / "a")
    owner, name, after = MOMENTS[moment]
    hook = Hook(monkeypatch, owner, name, lambda: client.save(whole(2.0), checkpoint_id=tmp_path / "a"), after=after)
    made = parts()
    report = client.load(made, checkpoint_id=tmp_path / "a")
    assert hook.calls == 1
    # What was open when the name went to the new one is the old one, whole.
    assert found_in(made) == [1.0 if moment in {"a file is opened", "a file is read"} else 2.0]
    assert report.source == "disk"


@moments
def test_a_commit_of_another_structure_in_the_middle_mixes_nothing(daemon, client, tmp_path, monkeypatch, moment):
    client.save(whole(1.0), checkpoint_id=tmp_path / "a")
    other = {"before": torch.full((COLUMNS, 3), 9.0), **whole(2.0)}
    owner, name, after = MOMENTS[moment]
    Hook(monkeypatch, owner, name, lambda: client.save(other, checkpoint_id=tmp_path / "a"), after=after)
    made = parts()
    client.load(made, checkpoint_id=tmp_path / "a")
    assert found_in(made) in ([1.0], [2.0])


@pytest.mark.parametrize("moment", ["the index is read", "a file is opened"])
def test_whole_items_are_loaded_again_too_and_not_called_damaged(daemon, client, tmp_path, monkeypatch, moment):
    client.save(whole(1.0), checkpoint_id=tmp_path / "a")
    owner, name, after = MOMENTS[moment]
    Hook(monkeypatch, owner, name, lambda: client.save(whole(2.0), checkpoint_id=tmp_path / "a"), after=after)
    found = whole(0.0)
    client.load(found, checkpoint_id=tmp_path / "a")
    assert found_in(found) in ([1.0], [2.0])


@pytest.mark.parametrize("moment", ["the index is read", "the plan is made", "a file is opened"])
@pytest.mark.parametrize("wanted", [parts, lambda: whole(0.0)], ids=["parts", "whole"])
def test_stock_that_saves_into_the_directory_meanwhile_is_noticed(client, tmp_path, monkeypatch, moment, wanted):
    stock_save(whole(1.0), tmp_path / "a")
    owner, name, after = MOMENTS[moment]
    hook = Hook(monkeypatch, owner, name, lambda: stock_save(whole(2.0), tmp_path / "a"), after=after)
    found = wanted()
    client.load(found, checkpoint_id=tmp_path / "a")
    assert (hook.calls, found_in(found)) == (1, [2.0])


def test_a_checkpoint_that_is_replaced_at_every_look_fails_at_last(client, tmp_path, monkeypatch):
    stock_save(whole(1.0), tmp_path / "a")
    hook = Hook(
        monkeypatch,
        LoadPlanner,
        "plan",
        lambda: stock_save(whole(2.0), tmp_path / "a"),
        times=99,
        after=True,
    )
    with pytest.raises(Unsupported, match="others save into it"):
        client.load(whole(0.0), checkpoint_id=tmp_path / "a")
    assert hook.calls == 10


def test_what_is_wrong_with_a_checkpoint_that_nobody_replaced_is_told_at_once(daemon, client, tmp_path, monkeypatch):
    client.save(whole(1.0), checkpoint_id=tmp_path / "a")
    looks = Hook(monkeypatch, load_module, "read_index", lambda: None, times=99)
    image = tmp_path / "a" / "__0_0.distcp"
    image.write_bytes(bytes(image.stat().st_size))
    with pytest.raises(WrongBits):
        client.load(whole(0.0), checkpoint_id=tmp_path / "a")
    image.unlink()
    with pytest.raises(MissingFile):
        client.load(whole(0.0), checkpoint_id=tmp_path / "a")
    assert looks.calls == 2


def test_a_checkpoint_that_is_removed_meanwhile_is_unknown_then(daemon, client, tmp_path, monkeypatch):
    client.save(whole(1.0), checkpoint_id=tmp_path / "a")
    Hook(monkeypatch, load_module, "read_index", lambda: shutil.rmtree(tmp_path / "a"), after=True)
    with pytest.raises(client.CkptdError, match="no checkpoint at"):
        client.load(whole(0.0), checkpoint_id=tmp_path / "a")


def test_the_node_s_cache_knows_files_by_what_was_opened(daemon, client, tmp_path, monkeypatch):
    """Another rank that opens the new checkpoint must not get bytes of the old one as if they were its own."""
    identities = []
    real = nodecache.CachedFile.__init__

    def note(self, cache, disk, identity, ranges):
        identities.append(identity)
        real(self, cache, disk, identity, ranges)

    monkeypatch.setattr(nodecache.CachedFile, "__init__", note)
    client.save(whole(1.0), checkpoint_id=tmp_path / "a")
    inode = (tmp_path / "a" / "__0_0.distcp").stat().st_ino
    Hook(monkeypatch, Disk, "open", lambda: client.save(whole(2.0), checkpoint_id=tmp_path / "a"), after=True)
    cache = nodecache.NodeCache(None).over(Disk())
    cache.open(str(tmp_path / "a" / "__0_0.distcp"), [(0, 9)]).close()
    [identity] = identities
    assert identity.split(":")[1] == str(inode)


SAVE_ON = """
stop = threading.Event()
def save_on():
    step = 0
    while not stop.is_set():
        step += 1
        weights = {f'w{n}': torch.full((8, 16384), float(step)) for n in range(4)}
        if step % 2:
            weights = {'before': torch.zeros(step % 16 * 10000), **weights}
        dcp.save(weights, checkpoint_id=path)
saving = threading.Thread(target=save_on)
saving.start()
"""
LOAD_ON = """
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
class Columns(torch.Tensor):
    def __create_chunk_list__(self):
        return [ChunkStorageMetadata(offsets=torch.Size([0, 20]), sizes=torch.Size([8, 5]))]
    def __get_tensor_shard__(self, index):
        return self.shard
steps = []
found = {f'w{n}': torch.empty(8, 16384).as_subclass(Columns) for n in range(4)}
for value in found.values():
    value.shard = torch.zeros(8, 5)
for _ in range(loads):
    dcp.load(found, checkpoint_id=path)
    steps.append(torch.stack([value.shard for value in found.values()]).unique().tolist())
"""


def test_parts_of_a_checkpoint_that_is_overwritten_all_the_time_are_never_mixed(daemon, trainers, tmp_path):
    writer, reader = trainers.start(), trainers.start()
    writer.do(SAVE_ON, path=str(tmp_path / "a"))
    wait_until((tmp_path / "a").exists, "the first save", timeout_s=60)
    reader.do(LOAD_ON, path=str(tmp_path / "a"), loads=150)
    writer.do("stop.set()\nsaving.join()")
    steps = reader.get("steps")
    assert [step for step in steps if len(step) != 1] == []
    assert steps == sorted(steps)
    assert len({step for [step] in steps}) > 5
