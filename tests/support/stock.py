"""Checkpoints of torch.distributed.checkpoint, sharded too, made by one process without a group."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

Boxes = list[tuple[tuple[int, ...], tuple[int, ...]]]


def save_stock(state: dict[str, object], path: Path | str, *, boxes: dict[str, Boxes] | None = None, files: int = 1):
    """Save as stock does; ``boxes`` cuts tensors into chunks, as ranks would; ``files`` is how many it writes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no group; ComplexHalf is experimental
        writer = dcp.FileSystemWriter(str(path), thread_count=files)
        dcp.save(state, storage_writer=writer, planner=_Cutting(boxes or {}), no_dist=True)


def load_stock(path: Path | str) -> dict[str, object]:
    """Return all of a checkpoint, as stock makes one torch.save file of it."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    target = f"{path}.stock.pt"
    dcp_to_torch_save(path, target)
    return torch.load(target, weights_only=False)


class _Cutting(dcp.DefaultSavePlanner):
    def __init__(self, boxes: dict[str, Boxes]) -> None:
        super().__init__()
        self._boxes = boxes

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        items = []
        for item in plan.items:
            boxes = self._boxes.get(item.index.fqn)
            items += [item] if boxes is None else [self._cut(item, number, box) for number, box in enumerate(boxes)]
        self.plan = SavePlan(items, plan.storage_data, plan.planner_data)
        return self.plan

    def _cut(self, item: WriteItem, number: int, box: tuple[tuple[int, ...], tuple[int, ...]]) -> WriteItem:
        offsets, sizes = map(torch.Size, box)
        tensor = self.state_dict[item.index.fqn]
        data = TensorWriteData(
            ChunkStorageMetadata(offsets, sizes), TensorProperties.create_from_tensor(tensor), tensor.size()
        )
        return WriteItem(MetadataIndex(item.index.fqn, offsets, number), WriteItemType.SHARD, tensor_data=data)

    def lookup_object(self, index: MetadataIndex) -> object:
        boxes = self._boxes.get(index.fqn)
        value = self.state_dict[index.fqn]
        if boxes is None or index.offset is None:
            return value
        sizes = dict(boxes)[tuple(index.offset)]
        for axis, (begin, size) in enumerate(zip(index.offset, sizes, strict=True)):
            value = value.narrow(axis, begin, size)
        return value
