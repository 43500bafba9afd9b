"""Users' own planners and storage writers, as a trainer's modules would define them."""

from __future__ import annotations

import io
import os
import pickle
import signal
from pathlib import Path

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, StorageWriter
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future


class Doubling(DefaultSavePlanner):
    """Saves twice the value of each tensor."""

    def transform_object(self, write_item, object):
        data = super().transform_object(write_item, object)
        return data * 2 if isinstance(data, torch.Tensor) else data


class Failing(DefaultSavePlanner):
    """Fails in one of its calls."""

    def __init__(self, call):
        super().__init__()
        self.call = call

    def __getattribute__(self, name):
        if name == object.__getattribute__(self, "__dict__").get("call"):
            raise ValueError(f"no {name} today")
        return super().__getattribute__(name)


class Lethal(DefaultSavePlanner):
    """Kills the process that runs it, unless ``survive`` is there; leaves a mark for each run."""

    def __init__(self, marks, survive_from):
        super().__init__()
        self.marks, self.survive_from = Path(marks), survive_from

    def create_local_plan(self):
        runs = len(list(self.marks.iterdir()))
        (self.marks / f"run-{runs}").touch()
        if runs < self.survive_from:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().create_local_plan()


class PickleWriter(StorageWriter):
    """A user's own format: one pickle for each rank, and one for the metadata. Notes each call."""

    def __init__(self, path, *, fail_on_rank=None):
        self.path, self.fail_on_rank = str(path), fail_on_rank
        self.calls = []
        self.rank = None

    def reset(self, checkpoint_id=None):
        self.calls.append("reset")
        if checkpoint_id is not None:
            self.path = str(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator, *args, **kwargs):
        self.calls.append("set_up_storage_writer")
        self.rank, self.is_coordinator = kwargs["rank"], is_coordinator

    def prepare_local_plan(self, plan):
        self.calls.append("prepare_local_plan")
        os.makedirs(self.path, exist_ok=True)
        return plan

    def prepare_global_plan(self, plans):
        self.calls.append("prepare_global_plan")
        return plans

    def write_data(self, plan, planner):
        self.calls.append("write_data")
        if self.rank == self.fail_on_rank:
            raise OSError(28, "No space left on device", self.path)
        found, results = {}, []
        for item in plan.items:
            data = planner.resolve_data(item)
            value = data.getvalue() if isinstance(data, io.BytesIO) else data.detach().clone()
            found[(item.index.fqn, tuple(item.index.offset or ()))] = value
            results.append(WriteResult(item.index, 1, None))
        Path(self.path, f"rank-{self.rank}.pickle").write_bytes(pickle.dumps(found))
        done = Future()
        done.set_result(results)
        return done

    def finish(self, metadata, results):
        self.calls.append("finish")
        names = sorted({result.index.fqn for mine in results for result in mine})
        Path(self.path, "finished.pickle").write_bytes(pickle.dumps((names, self.calls, len(results))))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id):
        return True

    def storage_meta(self):
        return None


def read_back(path):
    """All that a PickleWriter wrote: by key and offset."""
    found = {}
    for file in sorted(Path(path).glob("rank-*.pickle")):
        found |= pickle.loads(file.read_bytes())
    return found


def index(fqn, *offset):
    """A MetadataIndex."""
    return MetadataIndex(fqn, torch.Size(offset) if offset else None)
