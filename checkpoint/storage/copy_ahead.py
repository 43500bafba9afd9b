"""Tensors of a plan on the CPU, those of an accelerator copied ahead of being written.

Invariant: at most the given bytes are on their way, plus one tensor: a plan is never held in memory as a whole.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem, WriteItemType

from ckptd.protocol.errors import Unsupported


class _Copy:
    """One tensor on its way."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._event: torch.Event | None = None
        self.nbytes = 0
        if tensor.device.type == "cpu":
            self._tensor = tensor
            return
        if tensor.layout is not torch.strided:
            self._tensor = tensor.cpu()
            return
        self.nbytes = tensor.numel() * tensor.element_size()
        self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._tensor.copy_(tensor, non_blocking=True)
        self._event = torch.Event(tensor.device.type)
        self._event.record()
        self._source = tensor  # not freed, and so not overwritten, before the copy is done

    def result(self) -> torch.Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._tensor


def resolved_objects(items: Sequence[WriteItem], planner: SavePlanner) -> Iterator[tuple[WriteItem, io.BytesIO]]:
    """Yield the objects among the items, one at a time. Raises Unsupported if the planner gives something else."""
    for item in items:
        if item.type is WriteItemType.BYTE_IO:
            data = planner.resolve_data(item)
            if not isinstance(data, io.BytesIO):
                raise Unsupported(f"{item.index.fqn}: a {type(data).__name__} for an object", "return a BytesIO")
            yield item, data


def resolved_tensors(
    items: Sequence[WriteItem], planner: SavePlanner, *, ahead_bytes: int
) -> Iterator[tuple[WriteItem, torch.Tensor]]:
    """Yield the tensors among the items, on the CPU, in order.

    Args:
        items: Resolved one by one, so that what a planner allocates is gone before the next.
        planner: Resolves them.
        ahead_bytes: How many bytes may be on their way from an accelerator while another tensor is written.

    Raises:
        Unsupported: The planner gives something else than a tensor.
    """
    under_way: deque[tuple[WriteItem, _Copy]] = deque()
    for item in items:
        if item.type is WriteItemType.BYTE_IO:
            continue
        data = planner.resolve_data(item)
        if not isinstance(data, torch.Tensor):
            raise Unsupported(f"{item.index.fqn}: a {type(data).__name__} for a tensor", "return a Tensor")
        under_way.append((item, _Copy(data.detach())))
        while under_way and sum(copy.nbytes for _, copy in under_way) >= ahead_bytes:
            first, copy = under_way.popleft()
            yield first, copy.result()
        while under_way and not under_way[0][1].nbytes:
            first, copy = under_way.popleft()
            yield first, copy.result()
    for first, copy in under_way:
        yield first, copy.result()
