"""Writes checkpoints with this interpreter's torch, or reads what another one's has written. Run by run.py.

exchange.py write DIR        with ckptd and with stock: one process, and two ranks
exchange.py read DIR         with ckptd and with stock; prints "WRITER LAYOUT READER: what was wrong, or ok"
exchange.py version
"""

from __future__ import annotations

import sys
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as stock
import torch.multiprocessing
from support import layouts
from support.states import assert_same, blank, everything
from torch.distributed.checkpoint.api import CheckpointException

import ckptd.client as dcp

RANKS = 2
SHARDED = "rows over 2"
WRITERS = {"ckptd": dcp.save, "stock": stock.save}
READERS = {"ckptd": dcp.load, "stock": stock.load}


def write(root):
    """Write what :func:`read` looks for."""
    for name, save in WRITERS.items():
        save(_everything(), checkpoint_id=f"{root}/{name}-whole")
    torch.multiprocessing.start_processes(_write_sharded, (root,), nprocs=RANKS, start_method="spawn")


def _write_sharded(rank, root):
    dist.init_process_group("gloo", init_method=f"file://{root}/store", rank=rank, world_size=RANKS)
    state = layouts.LAYOUTS[SHARDED].state(layouts.whole())
    for name, save in WRITERS.items():
        save(state, checkpoint_id=f"{root}/{name}-sharded")
    dist.barrier()
    dist.destroy_process_group()


def _everything():
    torch.manual_seed(0)  # the generator's state is part of it
    return everything()


def read(root):
    """Read with both, and tell what was wrong."""
    for writer in WRITERS:
        for layout in ("whole", "sharded"):
            for reader, load in READERS.items():
                print(f"{writer} {layout} {reader}: {_read(load, f'{root}/{writer}-{layout}', layout)}")


def _read(load, path, layout):
    wanted = _everything() if layout == "whole" else layouts.LAYOUTS["plain"].state(layouts.whole())
    found = blank(wanted)
    try:
        load(found, checkpoint_id=path)
        assert_same(found, wanted)
    except (Exception, CheckpointException) as error:  # noqa: BLE001  # the table tells it
        return f"{type(error).__name__}: {error}".replace("\n", " ")[:400]
    return "ok"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    match sys.argv[1:]:
        case ["write", directory]:
            write(directory)
        case ["read", directory]:
            read(directory)
        case ["version"]:
            print(torch.__version__.partition("+")[0])
        case _:
            sys.exit(__doc__)
