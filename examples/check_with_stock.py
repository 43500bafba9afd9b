"""Loads a checkpoint with stock torch.distributed.checkpoint, which knows nothing of ckptd, and prints its digest."""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import torch.distributed.checkpoint as stock
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from train import digest


def main() -> None:
    """Read the checkpoint named by the first argument as stock reads it: by `.metadata` alone."""
    warnings.simplefilter("ignore")
    state: dict[str, Any] = {}
    reader = stock.FileSystemReader(sys.argv[1])
    _load_state_dict(state, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    print(json.dumps({"step": state["step"], "digest": digest(state)}))


if __name__ == "__main__":
    main()
