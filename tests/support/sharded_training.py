"""Real training jobs of several ranks: one small model under DDP, FSDP2, tensor parallelism and mixtures of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as stock
from support.layouts import mesh_of
from support.states import assert_same
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import ckptd.client as dcp

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
LOADERS = {"ours": dcp.load, "stock": stock.load}


class Net(torch.nn.Module):
    """Two linear layers, a norm, a parameter of odd length and a counter."""

    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(16, 24), torch.nn.Linear(24, 16)
        self.norm = torch.nn.LayerNorm(16)
        self.odd = torch.nn.Parameter(torch.randn(7))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        out = self.norm(self.down(torch.tanh(self.up(x))))
        return out[:, :7] * self.odd + out[:, 7:14]


@dataclass(frozen=True)
class Kind:
    """A way to train.

    Attributes:
        world_size: How many ranks it takes.
        spread: Turn the model into a parallel one.
        tp: Ranks that see the same data.
    """

    world_size: int
    spread: Callable[[Net], torch.nn.Module]
    tp: int = 1


def _fsdp(*shape):
    def spread(net):
        for layer in (net.up, net.down):
            fully_shard(layer, mesh=mesh_of(*shape))
        return fully_shard(net, mesh=mesh_of(*shape))

    return spread


def _tp(net, mesh):
    return parallelize_module(net, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def _fsdp_and_tp(dp, tp):
    def spread(net):
        mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
        return fully_shard(_tp(net, mesh["tp"]), mesh=mesh["dp"])

    return Kind(dp * tp, spread, tp)


KINDS = {
    "DDP 2": Kind(2, DistributedDataParallel),
    "FSDP 2": Kind(2, _fsdp(2)),
    "TP 2": Kind(2, lambda net: _tp(net, mesh_of(2)), tp=2),
    "FSDP 3": Kind(3, _fsdp(3)),
    "HSDP 2x2": Kind(4, _fsdp(2, 2)),
    "FSDP and TP 2x2": _fsdp_and_tp(2, 2),
    "FSDP 8": Kind(8, _fsdp(8)),
    "FSDP and TP 2x4": _fsdp_and_tp(2, 4),
    "FSDP and TP 4x2": _fsdp_and_tp(4, 2),
}


class Job:
    """A model and its optimizer, made from a seed, as one rank of a kind."""

    def __init__(self, kind, seed):
        torch.manual_seed(seed)
        self.kind = KINDS[kind]
        self.model = self.kind.spread(Net())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)

    def step(self, number):
        """Train one step on this rank's data and return the loss."""
        data = torch.Generator().manual_seed(1000 * number + dist.get_rank() // self.kind.tp)
        loss = self.model(torch.randn(4, 16, generator=data)).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        net = self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
        net.seen += 1
        return float(loss)

    def state(self, step):
        """Return the state dict, as torch's guide to DCP has it."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "step": step}

    def load(self, path, load):
        """Load a checkpoint and return its step."""
        state = self.state(step=None)
        load(state, checkpoint_id=path)
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        return state["step"]

    def whole(self):
        """Return all that was learnt, unsharded, on rank 0; nothing on the others. Runs collectives."""
        model = get_model_state_dict(self.model, options=FULL)
        return {"model": model, "optimizer": get_optimizer_state_dict(self.model, self.optimizer, options=FULL)}

    def local(self):
        """Return copies of what this rank holds."""
        state = self.state(step=0)
        return _map(state, lambda t: (t.to_local() if isinstance(t, DTensor) else t).detach().clone())


def _map(value, function):
    if isinstance(value, torch.Tensor):
        return function(value)
    return {key: _map(inner, function) for key, inner in value.items()} if isinstance(value, dict) else value


def train_and_save(kind, root):
    """Train two steps, save with ckptd and with stock, train two more while the save is under way.

    Returns the losses; what the job has learnt at the save and at the end stays in files and in this process.
    """
    job = Job(kind, seed=0)
    losses = [job.step(1), job.step(2)]
    learnt = job.whole()
    if dist.get_rank() == 0:
        torch.save(learnt, f"{path_of(root, kind, 'whole')}.pt")
    state = job.state(step=2)
    stock.save(state, checkpoint_id=path_of(root, kind, "stock"))
    future = dcp.async_save(state, checkpoint_id=path_of(root, kind, "ours"))
    del state
    losses += [job.step(3), job.step(4)]
    future.result(60)
    return losses, job.local()


def resume(kind, root, way):
    """Start from another seed, train a step, load, train on; return step, losses and what this rank then holds."""
    saved, load = way.split(" to ")
    job = Job(kind, seed=1)
    job.step(99)
    step = job.load(path_of(root, kind, saved), LOADERS[load])
    return step, [job.step(3), job.step(4)], job.local()


def load_others(kind, root):
    """Load what every kind has saved into a job of this kind; return what was wrong, by kind and loader.

    Small worlds load with stock, too; in large ones its collectives take too long.
    """
    found = {}
    loaders = LOADERS if dist.get_world_size() < 4 else {"ours": dcp.load}
    job = Job(kind, seed=1)
    job.step(99)
    for writer in KINDS:
        for name, load in loaders.items():
            found[writer, name] = _compare(job, path_of(root, writer, "ours"), load, path_of(root, writer, "whole"))
    return found


def _compare(job, path, load, whole):
    try:
        job.load(path, load)
        learnt = job.whole()
        if dist.get_rank() == 0:
            assert_same(learnt, torch.load(f"{whole}.pt", weights_only=False))
    except Exception as error:  # noqa: BLE001  # the test looks at it
        return f"{type(error).__name__}: {error}"
    return ""


def path_of(root, kind, who):
    """Return where a kind is saved."""
    return f"{root}/{kind.replace(' ', '-')}-{who}"
