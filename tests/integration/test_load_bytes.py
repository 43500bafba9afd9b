"""What a load really brings from the files, as the kernel counts it: the bytes that are needed, and 5 % at most."""

from __future__ import annotations

import os

import pytest
import torch
from support.meshes import as_rank, dtensor
from torch.distributed.tensor import Shard

AT_MOST = 1.05
# The index, /proc/self/io itself, and what Python reads of its own.
BESIDES = 64 * 1024
ROWS, COLUMNS = 2048, 1536


def bytes_read() -> int:
    """Bytes that read calls of this process have returned, from any cache or disk."""
    with open("/proc/self/io") as counters:
        return int(next(line.split()[1] for line in counters if line.startswith("rchar")))


def bytes_from_disk() -> int:
    """Bytes that this process made disks bring, as the kernel counts them."""
    with open("/proc/self/io") as counters:
        return int(next(line.split()[1] for line in counters if line.startswith("read_bytes")))


def drop(folder) -> None:
    """Drop a checkpoint from the page cache."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


@pytest.fixture
def checkpoint(daemon, client, tmp_path):
    """A checkpoint of twelve MiB tensors and many small ones."""
    big = torch.arange(ROWS * COLUMNS, dtype=torch.float32).view(ROWS, COLUMNS)
    state = {
        "model": {f"w{number}": big + number for number in range(3)},
        "optim": {"state": {f"w{number}": {"m": -big - number, "step": torch.tensor(number)} for number in range(3)}},
        "norms": {f"n{number}": torch.full((700,), float(number)) for number in range(200)},
    }
    client.save(state, checkpoint_id=tmp_path / "a")
    return tmp_path / "a", state


@pytest.fixture(params=["cold", "warm"])
def cache(request, checkpoint):
    """Both ways that bytes come."""
    path, _ = checkpoint
    if request.param == "cold":
        drop(path)
    else:
        for file in path.iterdir():
            file.read_bytes()


def load_and_count(client, state, path):
    """Load, and return the report and the bytes that were read meanwhile."""
    before = bytes_read()
    report = client.load(state, checkpoint_id=path)
    return report, bytes_read() - before


def test_one_key_costs_its_own_bytes(checkpoint, cache, client):
    path, saved = checkpoint
    wanted = {"model": {"w1": torch.zeros(ROWS, COLUMNS)}}
    report, counted = load_and_count(client, wanted, path)
    assert torch.equal(wanted["model"]["w1"], saved["model"]["w1"])
    assert report.needed_bytes == saved["model"]["w1"].nbytes
    assert report.read_bytes <= AT_MOST * report.needed_bytes
    assert counted <= AT_MOST * report.needed_bytes + BESIDES


def test_everything_costs_little_more_than_the_payload(checkpoint, cache, client):
    path, saved = checkpoint
    wanted = {
        "model": {key: torch.zeros_like(value) for key, value in saved["model"].items()},
        "norms": {key: torch.zeros_like(value) for key, value in saved["norms"].items()},
    }
    report, counted = load_and_count(client, wanted, path)
    assert all(torch.equal(wanted["norms"][key], saved["norms"][key]) for key in saved["norms"])
    assert report.read_bytes <= AT_MOST * report.needed_bytes
    assert counted <= AT_MOST * report.needed_bytes + BESIDES


def test_small_keys_alone_cost_their_own_bytes(checkpoint, cache, client):
    path, saved = checkpoint
    wanted = {"norms": {key: torch.zeros_like(value) for key, value in saved["norms"].items()}}
    report, counted = load_and_count(client, wanted, path)
    assert all(torch.equal(wanted["norms"][key], saved["norms"][key]) for key in saved["norms"])
    assert report.needed_bytes == 200 * 2800
    assert report.read_bytes <= AT_MOST * report.needed_bytes
    assert counted <= AT_MOST * report.needed_bytes + BESIDES


@pytest.mark.parametrize("dimension", [0, 1])
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_a_shard_costs_its_own_bytes_however_it_is_cut(checkpoint, cache, client, dimension, world_size):
    path, saved = checkpoint
    rank = world_size - 1
    parts = [whole.chunk(world_size, dimension)[rank] for whole in saved["model"].values()]
    with as_rank(rank, world_size):
        shards = [
            dtensor(torch.zeros(part.shape), (ROWS, COLUMNS), [Shard(dimension)], (world_size,)) for part in parts
        ]
        wanted = {"model": {f"w{number}": shard for number, shard in enumerate(shards)}}
        report, counted = load_and_count(client, wanted, path)
        found = [shard.to_local() for shard in shards]
    assert all(torch.equal(a, b) for a, b in zip(found, parts, strict=True))
    assert report.needed_bytes == sum(part.nbytes for part in parts)
    assert report.read_bytes <= AT_MOST * report.needed_bytes
    assert counted <= AT_MOST * report.needed_bytes + BESIDES


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_the_disk_brings_little_more_than_the_tensors_whose_columns_are_wanted(checkpoint, client, world_size):
    path, saved = checkpoint
    wanted = {"model": {}}
    with as_rank(world_size - 1, world_size):
        for name in ("w0", "w2"):
            part = torch.zeros(saved["model"][name].chunk(world_size, 1)[0].shape)
            wanted["model"][name] = dtensor(part, (ROWS, COLUMNS), [Shard(1)], (world_size,))
        drop(path)
        before = bytes_from_disk()
        client.load(wanted, checkpoint_id=path)
        brought = bytes_from_disk() - before
        for name, found in wanted["model"].items():
            assert torch.equal(found.to_local(), saved["model"][name].chunk(world_size, 1)[-1])
    tensors = sum(saved["model"][name].nbytes for name in wanted["model"])
    # Rows lie 6 KiB apart: of a half every block is needed, of an eighth not.
    at_least = 0.9 * tensors if world_size == 2 else tensors / world_size
    assert at_least <= brought <= AT_MOST * tensors + BESIDES


def test_a_load_that_does_not_fit_reads_no_payload(checkpoint, client):
    path, _ = checkpoint
    before = bytes_read()
    with pytest.raises(client.CkptdError, match="Missing key"):
        client.load({"model": {"w0": torch.zeros(ROWS, COLUMNS), "no": torch.zeros(1)}}, checkpoint_id=path)
    assert bytes_read() - before < 4 * BESIDES
