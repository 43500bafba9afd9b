"""What the ranks of the sharded tests do, and the process from which they are forked.

One process per rank saves all layouts of its world size and loads those of all others, so that a pair of layouts costs
two loads and not two process groups. Run as a script, this is the nursery with all that they need imported once.
"""

from __future__ import annotations

import datetime
import faulthandler
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script, it finds its siblings no other way

import torch.distributed as dist
import torch.distributed.checkpoint as stock
from support import layouts, nursery
from support.layouts import LAYOUTS

import ckptd.client as dcp

WAYS = ("ours to ours", "ours to stock", "stock to ours")
# What stock loads into 8 ranks: its collectives among eight processes on two cores would take most of the time.
FOR_STOCK_ON_8 = {"plain", "replicas on 2", "tiles on 3", "FSDP and TP 2x2", "grid 2x4"}
# A rank that fails leaves the others in a collective; they are to say so before the test's own patience ends.
GROUP_TIMEOUT_S = 50


def join(store, rank, world_size):
    """Make the process group of this rank."""
    timeout = datetime.timedelta(seconds=GROUP_TIMEOUT_S)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timeout)


def save_layout(name, root):
    """Save a layout twice: with ckptd, and with stock where it can. Returns ckptd's metadata."""
    state = LAYOUTS[name].state(layouts.whole())
    if LAYOUTS[name].stock:
        stock.save(state, checkpoint_id=path_of(root, name, "stock"))
    return dcp.async_save(state, checkpoint_id=path_of(root, name, "ours")).result(60)


def path_of(root, name, who):
    """Return where a layout is saved."""
    return f"{root}/{name.replace(' ', '-')}-{who}"


def load_layout(name, root):
    """Load what all layouts have saved into this one; return what was wrong by writer and way, "" for nothing."""
    reader, wanted, blank = LAYOUTS[name], LAYOUTS[name].state(layouts.whole()), layouts.blank()
    found = {}
    for writer in LAYOUTS:
        for way in WAYS:
            saved, load = way.split(" to ")
            known = all(layout.stock for who, layout in ((saved, LAYOUTS[writer]), (load, reader)) if who == "stock")
            if known and (load == "ours" or reader.world_size < 8 or writer in FOR_STOCK_ON_8):
                state = reader.state(blank, step=None)
                found[writer, way] = _load(state, path_of(root, writer, saved), load, wanted)
    return found


def _load(state, path, load, wanted):
    try:
        (dcp if load == "ours" else stock).load(state, checkpoint_id=path)
    except Exception as error:  # noqa: BLE001  # the test looks at it
        return f"{type(error).__name__}: {error}"
    wrong = layouts.differences(state, wanted)
    return f"wrong bits in {', '.join(wrong)}" if wrong else ""


if __name__ == "__main__":
    import support.meshes  # makes a DTensor, for which torch loads its compiler: 1.6 s once, not in each rank
    import support.sharded_training  # noqa: F401

    warnings.simplefilter("ignore")
    faulthandler.enable()
    nursery.main()
