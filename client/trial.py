"""One save and one load through the daemon, timed: ``python -m ckptd.client.trial PATH BYTES`` prints a line of JSON.

What `ckptd bench` starts: a trainer, so a process of its own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Final

import torch

from ckptd.client.loading.loader import load
from ckptd.client.saving.saver import async_save
from ckptd.client.session.sessions import close_all, connect
from ckptd.protocol.errors import CkptdError

_TENSORS: Final = 16
_WAIT_S: Final = 600.0


def run(path: str, nbytes: int) -> dict[str, float | int]:
    """Save ``nbytes`` to a new checkpoint, and load it again.

    Args:
        path: The checkpoint; must not exist.
        nbytes: Size of the state dict in bytes.

    Returns:
        Seconds of each phase, and the bytes.

    Raises:
        CkptdError: The save or the load failed.
    """
    state = {f"tensor-{n}": torch.full((nbytes // _TENSORS // 4,), float(n)) for n in range(_TENSORS)}
    moved = sum(tensor.nbytes for tensor in state.values())
    begun = time.perf_counter()
    connect(state)  # makes and touches the staging memory, as a trainer does before its first step
    connected = time.perf_counter()
    future = async_save(state, checkpoint_id=path)
    staged = time.perf_counter()
    future.result(_WAIT_S)
    durable = time.perf_counter()
    target = {name: torch.full_like(tensor, -1.0) for name, tensor in state.items()}
    loading = time.perf_counter()
    load(target, checkpoint_id=path)
    loaded = time.perf_counter()
    if any(not torch.equal(target[name], tensor) for name, tensor in state.items()):
        raise AssertionError("what was loaded is not what was saved")
    times = {"connect_s": connected - begun, "stall_s": staged - connected, "durable_s": durable - connected}
    return {"bytes": moved, **times, "load_s": loaded - loading}


def main() -> int:
    """Return the exit status."""
    try:
        print(json.dumps(run(os.path.abspath(sys.argv[1]), int(sys.argv[2]))))  # noqa: T201
    except CkptdError as error:
        print(f"ckptd: {error}", file=sys.stderr)  # noqa: T201
        return 1
    finally:
        close_all()
    return 0


if __name__ == "__main__":
    sys.exit(main())
