"""The state dict that is saved: a transformer with Adam's state, of about so many bytes and tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import torch
import xxhash

StateDict = dict[str, Any]

# A parameter has itself, two moments and a step: four tensors, three of them as large as the parameter.
_TENSORS_PER_PARAMETER: Final = 4
_LARGE_PER_PARAMETER: Final = 3
_PARAMETERS_PER_LAYER: Final = 12
_BYTES_PER_ELEMENT: Final = 4
# Heads are 64 wide in most models; a finer step lets small state dicts come near the wanted size.
_WIDTH_STEP: Final = 16
_VOCABULARY: Final = 8192
_POSITIONS: Final = 1024


@dataclass(frozen=True)
class Shape:
    """A transformer's size."""

    layers: int
    width: int

    @classmethod
    def of(cls, nbytes: int, tensors: int) -> Shape:
        """Return the transformer whose state has about ``nbytes`` bytes in about ``tensors`` tensors."""
        layers = max(1, round((tensors / _TENSORS_PER_PARAMETER - 4) / _PARAMETERS_PER_LAYER))
        elements = nbytes / _BYTES_PER_ELEMENT / _LARGE_PER_PARAMETER
        # 12 * layers * width**2 + (vocabulary + positions) * width = elements
        square, linear = 12 * layers, _VOCABULARY + _POSITIONS
        width = (math.sqrt(linear**2 + 4 * square * elements) - linear) / (2 * square)
        return cls(layers, max(_WIDTH_STEP, round(width / _WIDTH_STEP) * _WIDTH_STEP))

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each parameter, by name."""
        width = self.width
        layer = {
            "self_attn.in_proj_weight": (3 * width, width),
            "self_attn.in_proj_bias": (3 * width,),
            "self_attn.out_proj.weight": (width, width),
            "self_attn.out_proj.bias": (width,),
            "linear1.weight": (4 * width, width),
            "linear1.bias": (4 * width,),
            "linear2.weight": (width, 4 * width),
            "linear2.bias": (width,),
            "norm1.weight": (width,),
            "norm1.bias": (width,),
            "norm2.weight": (width,),
            "norm2.bias": (width,),
        }
        shapes: dict[str, tuple[int, ...]] = {
            "embedding.weight": (_VOCABULARY, width),
            "positions.weight": (_POSITIONS, width),
        }
        for number in range(self.layers):
            shapes.update({f"layers.{number}.{name}": shape for name, shape in layer.items()})
        return shapes | {"norm.weight": (width,), "norm.bias": (width,)}


def make_state_dict(nbytes: int, tensors: int) -> StateDict:
    """Return a state dict as a trainer has it in the middle of a run: every page touched, no two values alike.

    Args:
        nbytes: About how many bytes its tensors have.
        tensors: About how many tensors it has.
    """
    torch.manual_seed(0)
    shapes = Shape.of(nbytes, tensors).parameters()
    model = {name: torch.empty(shape).uniform_(-1, 1) for name, shape in shapes.items()}
    state = {
        name: {
            "step": torch.tensor(1000.0),
            "exp_avg": torch.empty(shape).uniform_(-1, 1),
            "exp_avg_sq": torch.empty(shape).uniform_(),
        }
        for name, shape in shapes.items()
    }
    group = {"lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "params": list(shapes)}
    return {"model": model, "optimizer": {"state": state, "param_groups": [group]}, "step": 1000}


def tensors_of(state: StateDict) -> list[torch.Tensor]:
    """Return the tensors of a state dict, in its order."""
    found: list[torch.Tensor] = []
    for value in state.values():
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, dict):
            found.extend(tensors_of(value))
    return found


def bytes_of(state: StateDict) -> int:
    """Return the bytes of all its tensors."""
    return sum(tensor.nbytes for tensor in tensors_of(state))


def digest_of(state: StateDict) -> str:
    """Return a hash of all its tensors' bytes, so that a load can be checked."""
    digest = xxhash.xxh3_64()
    for tensor in tensors_of(state):
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def clear(state: StateDict) -> None:
    """Overwrite all tensors with zeros; the pages stay touched."""
    for tensor in tensors_of(state):
        tensor.zero_()
