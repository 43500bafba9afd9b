"""Hypothesis strategies for what a checkpoint is made of: shapes, tensors, state dicts, tilings, meshes and shards.

A *box* is ``(offsets, sizes)`` in elements. Everything is small: a hundred examples take a second or two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard

Box = tuple[tuple[int, ...], tuple[int, ...]]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)
# Few and treacherous: dots, numbers as text, the same key twice once they are joined.
KEYS = ("a", "b", "w", "a.b", "0", "1", "", "layers")
MOST_ELEMENTS = 5


def shapes(*, max_dims: int = 3, min_dims: int = 0, min_size: int = 0) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes, scalars and empty ones among them."""
    sizes = st.integers(min_size, MOST_ELEMENTS)
    return st.lists(sizes, min_size=min_dims, max_size=max_dims).map(tuple)


def dtypes() -> st.SearchStrategy[torch.dtype]:
    """The element types of models, optimizers and masks."""
    return st.sampled_from(DTYPES)


@st.composite
def tensors(draw, shape: st.SearchStrategy[tuple[int, ...]] | None = None) -> torch.Tensor:
    """Plain tensors and parameters; all values differ where the element type allows it."""
    size = draw(shapes() if shape is None else shape)
    dtype = draw(dtypes())
    values = (torch.arange(math.prod(size)) + draw(st.integers(0, 40))).to(dtype).reshape(size)
    if dtype.is_floating_point and draw(st.booleans()):
        return torch.nn.Parameter(values)
    return values


def objects() -> st.SearchStrategy[object]:
    """What is not a tensor: numbers, text, and small containers of them."""
    scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=3))
    return scalars | st.tuples(scalars, scalars) | st.lists(scalars, max_size=2) | st.binary(max_size=3)


def keys() -> st.SearchStrategy[str]:
    """Keys of state dicts."""
    return st.sampled_from(KEYS)


def state_dicts(
    *,
    key: st.SearchStrategy[object] | None = None,
    leaf: st.SearchStrategy[object] | None = None,
    max_leaves: int = 6,
) -> st.SearchStrategy[dict[str, object]]:
    """Nested state dicts with lists and tuples in them; two paths may have the same joined name."""
    inner_keys = keys() if key is None else key
    leaves = tensors() | objects() if leaf is None else leaf
    values = st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(inner_keys, inner, max_size=3)
            | st.tuples(inner, inner)  # a leaf, whatever is in it
        ),
        max_leaves=max_leaves,
    )
    return st.dictionaries(inner_keys, values, max_size=4)


@st.composite
def tilings(draw, shape: tuple[int, ...], *, max_cuts: int = 4) -> list[Box]:
    """Boxes that tile a shape: it is cut in two, again and again, in any dimension."""
    boxes: list[Box] = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, max_cuts))):
        at = draw(st.integers(0, len(boxes) - 1))
        offsets, sizes = boxes[at]
        along = [d for d, size in enumerate(sizes) if size > 1]
        if not along:
            continue
        d = draw(st.sampled_from(along))
        cut = draw(st.integers(1, sizes[d] - 1))
        low = (offsets, (*sizes[:d], cut, *sizes[d + 1 :]))
        moved = (*offsets[:d], offsets[d] + cut, *offsets[d + 1 :])
        boxes[at : at + 1] = [low, (moved, (*sizes[:d], sizes[d] - cut, *sizes[d + 1 :]))]
    return boxes


@st.composite
def flawed_tilings(draw, shape: tuple[int, ...]) -> list[Box]:
    """Boxes that miss a tiling of a shape, which has at least one dimension and element, by one box or element."""
    boxes = draw(tilings(shape))
    at = draw(st.integers(0, len(boxes) - 1))
    offsets, sizes = boxes.pop(at)
    d = draw(st.integers(0, len(shape) - 1))
    match draw(st.sampled_from(["gap", "twice", "nudged", "longer", "shorter"])):
        case "twice":
            # One element further on where there is room, so that it is an overlap and no replica.
            moved = (*offsets[:d], max(0, offsets[d] - 1), *offsets[d + 1 :])
            boxes += [(offsets, sizes), (moved, (*sizes[:d], sizes[d] + 1, *sizes[d + 1 :]))]
        case "nudged":
            boxes.append(((*offsets[:d], offsets[d] + 1, *offsets[d + 1 :]), sizes))
        case "longer":
            boxes.append((offsets, (*sizes[:d], sizes[d] + 1, *sizes[d + 1 :])))
        case "shorter":
            boxes.append((offsets, (*sizes[:d], sizes[d] - 1, *sizes[d + 1 :])))
    return boxes


def meshes(*, max_ranks: int = 6) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes of device meshes, of one or two dimensions."""
    one = st.integers(1, max_ranks).map(lambda ranks: (ranks,))
    two = st.tuples(st.integers(1, max_ranks), st.integers(1, max_ranks))
    return one | two.filter(lambda mesh: mesh[0] * mesh[1] <= max_ranks)


def placements(ndim: int, mesh: tuple[int, ...]) -> st.SearchStrategy[list[Shard | Replicate]]:
    """Placements of a tensor of ``ndim`` dimensions on a mesh; a shard may be uneven, or empty."""
    shard = st.integers(0, ndim - 1).map(Shard) if ndim else st.nothing()
    return st.lists(shard | st.just(Replicate()), min_size=len(mesh), max_size=len(mesh))


@dataclass(frozen=True)
class Spread:
    """A tensor cut into boxes, each of which one or several ranks hold.

    Attributes:
        shape: Global shape.
        dtype: Element type.
        boxes: They tile the shape.
        holders: Per box, the ranks that hold it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: tuple[Box, ...]
    holders: tuple[frozenset[int], ...]

    def held_by(self, rank: int) -> list[Box]:
        """Return the boxes of a rank."""
        return [box for box, ranks in zip(self.boxes, self.holders, strict=True) if rank in ranks]


@st.composite
def spreads(draw, world_size: int, *, min_size: int = 1) -> Spread:
    """Tensors spread over ranks in any way that leaves no gap."""
    shape = draw(shapes(min_size=min_size))
    boxes = draw(tilings(shape))
    holders = [draw(st.frozensets(st.integers(0, world_size - 1), min_size=1)) for _ in boxes]
    return Spread(shape, draw(dtypes()), tuple(boxes), tuple(holders))


def jobs(*, max_ranks: int = 4) -> st.SearchStrategy[tuple[int, dict[str, Spread]]]:
    """A world size, and tensors spread over its ranks."""

    def of(world_size: int) -> st.SearchStrategy[tuple[int, dict[str, Spread]]]:
        named = st.dictionaries(st.sampled_from(["w", "b", "m.v", "x"]), spreads(world_size), max_size=4)
        return st.tuples(st.just(world_size), named)

    return st.integers(1, max_ranks).flatmap(of)
