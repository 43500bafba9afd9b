"""What each of several gloo ranks does with our storage back-ends under stock's functions. Run as a script.

Arguments: rank, world size, folder. Leaves what it has seen in ``seen-RANK.json``.
"""

from __future__ import annotations

import datetime
import errno
import json
import os
import sys
import warnings
from pathlib import Path

warnings.simplefilter("ignore")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.distributed.checkpoint as stock  # noqa: E402
from torch.distributed.checkpoint import _fsspec_filesystem as fsspec_filesystem  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.tensor import Replicate, Shard, distribute_tensor  # noqa: E402

from ckptd.checkpoint.storage import posix_sink  # noqa: E402
from ckptd.checkpoint.storage.filesystem import FileSystemReader, FileSystemWriter  # noqa: E402
from ckptd.checkpoint.storage.objects import FsspecReader, FsspecWriter  # noqa: E402
from ckptd.protocol.errors import SystemCallFailed  # noqa: E402

WHOLE = torch.arange(7 * 12, dtype=torch.float32).reshape(7, 12)
# A rank that fails leaves the others in a collective; they are to say so before the test's own patience ends.
GROUP_TIMEOUT_S = 60


def state(mesh, placement, *, number=1.0, blank=False):
    whole = torch.zeros_like(WHOLE) if blank else WHOLE * number
    return {
        "sharded": distribute_tensor(whole, mesh, [placement]),
        "everywhere": torch.zeros(5) if blank else torch.full((5,), number),
        "step": 0 if blank else int(number),
    }


def holds(found, number):
    whole = torch.equal(found["sharded"].full_tensor(), WHOLE * number)
    return whole and bool((found["everywhere"] == number).all()) and found["step"] == int(number)


def loaded(reader, mesh, number):
    """Whether a checkpoint holds what was saved, loaded in two other layouts."""
    good = []
    for placement in (Shard(1), Replicate()):
        found = state(mesh, placement, blank=True)
        stock.load(found, storage_reader=reader)
        good.append(holds(found, number))
    return all(good)


def scenarios(mesh, rank, folder):
    """Yield name and outcome of everything that is tried, in the same order on all ranks."""
    for name, writer, reader, theirs in (
        ("files", FileSystemWriter, FileSystemReader, stock.FileSystemReader),
        ("objects", FsspecWriter, FsspecReader, fsspec_filesystem.FsspecReader),
    ):
        place = f"{folder}/{name}" if name == "files" else f"file://{folder}/{name}"
        stock.save(state(mesh, Shard(0)), storage_writer=writer(place, thread_count=2))
        yield f"{name}: ours to ours", loaded(reader(place), mesh, 1.0)
        yield f"{name}: ours to stock", loaded(theirs(place), mesh, 1.0)
        stock.save(state(mesh, Shard(1), number=2.0), storage_writer=writer(place))
        yield f"{name}: overwritten", loaded(reader(place), mesh, 2.0)
        future = stock.async_save(state(mesh, Shard(0), number=3.0), storage_writer=writer(place))
        future.result(GROUP_TIMEOUT_S)
        yield f"{name}: async_save", loaded(reader(place), mesh, 3.0)
    stock.save(state(mesh, Shard(0)), storage_writer=stock.FileSystemWriter(f"{folder}/stock"))
    yield "files: stock to ours", loaded(FileSystemReader(f"{folder}/stock"), mesh, 1.0)
    stock.save(state(mesh, Shard(0)), storage_writer=FileSystemWriter(f"{folder}/apart"), use_collectives=False)
    found = state(mesh, Shard(0), blank=True)
    stock.load(found, storage_reader=FileSystemReader(f"{folder}/apart"))
    yield "files: ranks apart", holds(found, 1.0)
    dist.barrier()
    yield "one rank fails", fails(mesh, rank, folder)
    yield "and the old checkpoint stands", loaded(FileSystemReader(f"{folder}/files"), mesh, 3.0)


def fails(mesh, rank, folder):
    """Save while rank 1 meets a full disk; return what this rank is told."""
    original = posix_sink.PosixSink._pwrite

    def full(sink, data, offset):
        raise SystemCallFailed("pwrite", sink._path, errno.ENOSPC)

    posix_sink.PosixSink._pwrite = full if rank == 1 else original
    try:
        stock.save(state(mesh, Shard(0), number=9.0), storage_writer=FileSystemWriter(f"{folder}/files"))
    except stock.CheckpointException as error:
        return sorted(str(cause[0]) for cause in error.failures.values())
    finally:
        posix_sink.PosixSink._pwrite = original
        dist.barrier()
    return []


def main():
    rank, world_size, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    timeout = datetime.timedelta(seconds=GROUP_TIMEOUT_S)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size, timeout=timeout)
    mesh = init_device_mesh("cpu", (world_size,))
    seen = dict(scenarios(mesh, rank, f"{folder}/saved"))
    Path(folder, f"seen-{rank}.json").write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()
    # All that was seen is written. Going on through the interpreter's end, torch sometimes aborts: "terminate called
    # without an active exception", a thread of its own that nobody has joined.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main()
