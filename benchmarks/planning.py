"""Planning and metadata: one rank's plan, a job's plan, and what writing and reading a million items' metadata takes.

Ours is measured as the client, a worker and a load call it; stock as its file system's writer and reader do:
`pickle.dump` of torch's objects to a file, and `pickle.load` of it.
"""

from __future__ import annotations

import gc
import pickle
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import torch
import torch.distributed.checkpoint as stock
import xxhash
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from benchmarks.samples import FormatSample, PlanningResult, ReshardSample
from benchmarks.shards import columns_of, is_loaded, save_as_ranks, shape_of
from benchmarks.systems import Ckptd
from ckptd.checkpoint.collector import collector_paused
from ckptd.checkpoint.indexing.columns import Index
from ckptd.checkpoint.indexing.index import decode_index, encode_index
from ckptd.checkpoint.planning.items import BALANCED, LocalPlan, decode_plan
from ckptd.checkpoint.planning.plan import make_plan
from ckptd.checkpoint.stock.metadata_pickle import encode_metadata
from ckptd.checkpoint.stock.metadata_unpickle import decode_metadata
from ckptd.client.saving.layout import make_rank_layout
from ckptd.client.saving.snapshot import make_local_plan, take_snapshot
from ckptd.staging.dtypes import by_name

_LOCAL_ITEMS: Final = 10_000
_RANKS: Final = 256
_TENSORS: Final = 1_000
_SHARDS: Final = 1_000  # of each tensor, in the metadata of few tensors
_REPEATS: Final = 3
_LOCAL_REPEATS: Final = 9
_SAVED_BY: Final = 4
_LOADED_BY: Final = 3
_RESHARDED_TENSORS: Final = 64
_FLOAT32: Final = by_name("float32")
T = TypeVar("T")


def measure_planning(items: int, nbytes: int, *, directory: Path, tell: Callable[[str], None]) -> PlanningResult:
    """Measure everything.

    Args:
        items: Chunks of tensors in the metadata.
        nbytes: Bytes of the checkpoint that is loaded by other ranks than have saved it.
        directory: Where files go.
        tell: Called with what comes next.
    """
    tell(f"a local plan of {_LOCAL_ITEMS:,} items")
    plan_s, layout_s = _local_plans()
    tell(f"a plan of {_RANKS} ranks x {_TENSORS:,} tensors")
    global_s = _global_plans()
    formats = []
    for what, tensors in (("a chunk each", items), (f"{_SHARDS:,} chunks each", max(1, items // _SHARDS))):
        formats.append(_formats(f"{tensors:,} tensors, {what}", _index(tensors, items // tensors), directory, tell))
    tell("a load by other ranks than have saved")
    return PlanningResult(
        local_items=_LOCAL_ITEMS,
        local_plan_s=plan_s,
        layout_s=layout_s,
        ranks=_RANKS,
        tensors=_TENSORS,
        global_plan_s=global_s,
        formats=formats,
        reshard=_reshard(nbytes, directory),
    )


def _timed(call: Callable[[], T]) -> tuple[float, T]:
    begun = time.perf_counter()
    result = call()
    return time.perf_counter() - begun, result


def _local_plans() -> tuple[list[float], list[float]]:
    """Return the seconds of plans and of layouts of one rank."""
    state = {
        "model": {f"layers.{n}.weight": torch.empty(n % 100 + 1, 8) for n in range(_LOCAL_ITEMS - 100)},
        "options": {f"option {n}": n for n in range(100)},
    }
    snapshot, assigned = take_snapshot(state), np.arange(_LOCAL_ITEMS, dtype="<i8").tobytes()

    def plan() -> tuple[LocalPlan, str]:
        made = make_local_plan(snapshot, settings=BALANCED)
        return made, xxhash.xxh3_128_hexdigest(made.encode())

    plans, layouts = [], []
    for _ in range(_LOCAL_REPEATS):
        seconds, (made, digest) = _timed(plan)
        plans.append(seconds)
        layouts.append(_timed(partial(make_rank_layout, snapshot.structure, digest, made, assigned))[0])
    return plans, layouts


def _global_plans() -> list[float]:
    """Return the seconds of plans of a job whose ranks hold a row of each tensor."""
    encoded = [_rank_plan(rank).encode() for rank in range(_RANKS)]
    return [_timed(lambda: make_plan([decode_plan(plan) for plan in encoded]))[0] for _ in range(_REPEATS)]


def _rank_plan(rank: int) -> LocalPlan:
    shape = np.tile(np.array([[_RANKS, 64]]), (_TENSORS, 1))
    return LocalPlan(
        settings=BALANCED,
        names=[f"model.layers.{n}.weight" for n in range(_TENSORS)],
        paths=[("model", f"layers.{n}", "weight") for n in range(_TENSORS)],
        dtype=np.full(_TENSORS, _FLOAT32.code, np.uint8),
        ndim=np.full(_TENSORS, 2, np.uint8),
        shape=shape,
        requires_grad=np.zeros(_TENSORS, np.uint8),
        item_name=np.arange(_TENSORS),
        item_offsets=np.tile(np.array([[rank, 0]]), (_TENSORS, 1)),
        item_sizes=np.tile(np.array([[1, 64]]), (_TENSORS, 1)),
        capacity=np.zeros(_TENSORS, np.int64),
    )


def _index(tensors: int, chunks: int) -> Index:
    """Return the index of a checkpoint of float32 tensors, each saved in rows by as many ranks."""
    items, rows, columns = tensors * chunks, 16, 64
    data_bytes = np.full(items, rows * columns * _FLOAT32.itemsize_bytes)
    files = max(chunks, 64)
    return Index(
        header={},
        names=[f"model.layers.{n}.mlp.weight" for n in range(tensors)],
        paths=[("model", "layers", str(n), "mlp", "weight") for n in range(tensors)],
        dtype=np.full(tensors, _FLOAT32.code, np.uint8),
        ndim=np.full(tensors, 2, np.uint8),
        shape=np.tile(np.array([[rows * chunks, columns]]), (tensors, 1)),
        requires_grad=np.zeros(tensors, np.uint8),
        item_name=np.repeat(np.arange(tensors), chunks),
        item_offsets=np.stack([np.tile(np.arange(chunks) * rows, tensors), np.zeros(items, np.int64)], axis=1),
        item_sizes=np.tile(np.array([[rows, columns]]), (items, 1)),
        files=[f"__{rank}_0.distcp" for rank in range(files)],
        item_file=(np.arange(items) % files).astype(np.int32),
        record_offset=np.arange(items) // files * 8192 + 3400,
        record_bytes=data_bytes + 1200,
        data_offset=np.arange(items) // files * 8192 + 4096,
        data_bytes=data_bytes,
        item_hash=np.random.default_rng(0).integers(0, 1 << 63, items, np.uint64),
    )


def _objects(index: Index) -> Metadata:
    """Return torch's objects for an index, each made anew as stock's planner and writer do."""
    tensors: dict[str, Any] = {}
    for name, shape in zip(index.names, index.shape.tolist(), strict=True):
        tensors[name] = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size(shape), [])
    places = {}
    offsets, sizes = index.item_offsets.tolist(), index.item_sizes.tolist()
    rows = zip(index.item_name.tolist(), index.item_file.tolist(), index.record_offset.tolist(), strict=True)
    for item, (row, file, offset) in enumerate(rows):
        name, corner = index.names[row], torch.Size(offsets[item])
        tensors[name].chunks.append(ChunkStorageMetadata(corner, torch.Size(sizes[item])))
        info = _StorageInfo(index.files[file], offset, int(index.record_bytes[item]))
        places[MetadataIndex(name, corner)] = info
    return Metadata(tensors, dict(zip(index.names, index.paths, strict=True)), places)


def _formats(what: str, index: Index, directory: Path, tell: Callable[[str], None]) -> FormatSample:
    ours, metadata = directory / "ckptd", directory / "metadata"

    def read_index() -> Index:
        return decode_index(ours.read_bytes(), str(ours))

    def write_metadata() -> int:
        return metadata.write_bytes(encode_metadata(index, checkpoint_id=str(directory), save_id="save"))

    def read_metadata() -> Index:
        return decode_metadata(metadata.read_bytes(), str(metadata))

    tell(f"{what}: ours")
    index_write_s, write_peak = _measured(lambda: ours.write_bytes(encode_index(index)))
    index_read_s, read_peak = _measured(read_index)
    metadata_write_s, metadata_peak = _measured(write_metadata)
    tell(f"{what}: stock")
    stock_write_s, stock_read_s = _stock_seconds(index, metadata)
    metadata_read_s, stock_peak = _measured(read_metadata)
    return FormatSample(
        what=what,
        items=len(index.item_name),
        index_write_s=index_write_s,
        index_read_s=index_read_s,
        metadata_write_s=metadata_write_s,
        metadata_read_s=metadata_read_s,
        stock_write_s=stock_write_s,
        stock_read_s=stock_read_s,
        peak_bytes=[write_peak, read_peak, metadata_peak, stock_peak],
    )


def _stock_seconds(index: Index, path: Path) -> tuple[float, float]:
    """Return the seconds in which stock writes the metadata and reads it, beside the collector, as in a trainer."""
    with collector_paused():  # while the objects are made, which is not measured
        objects: Metadata | None = _objects(index)
    with path.open("wb") as target:
        write_s, _ = _timed(partial(pickle.dump, objects, target))
    objects = None
    gc.collect()
    with path.open("rb") as source:
        read_s, _ = _timed(partial(pickle.load, source))
    return write_s, read_s


def _measured(call: Callable[[], object]) -> tuple[list[float], int]:
    """Return the seconds of each repetition, and the most memory above that before the first."""
    before, seconds = _reset_peak(), []
    for _ in range(_REPEATS):
        took, result = _timed(call)
        seconds.append(took)
        del result
    return seconds, _status_bytes("VmHWM") - before


def _reset_peak() -> int:
    """Have the kernel count the peak anew; return the resident bytes. Source: proc(5), /proc/pid/clear_refs."""
    with suppress(PermissionError):  # then the peak is that of the whole process, and told too high
        Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def _reshard(nbytes: int, directory: Path) -> ReshardSample:
    """Save by rows as some ranks, load by columns as one of some others."""
    path, tensors = directory / "resharded", _RESHARDED_TENSORS
    system = Ckptd()
    system.open({"w": torch.zeros(1)})  # the daemon, which the ranks find by their environment
    try:
        save_as_ranks(path, nbytes=nbytes, tensors=tensors, world_size=_SAVED_BY)
    finally:
        system.close()
    shape, seconds = shape_of(nbytes, tensors), dict[str, list[float]](ours=[], stock=[])
    calls: dict[str, Callable[[dict[str, Any], Path], None]] = {"ours": system.load, "stock": _load_stock}
    for number in range(_REPEATS + 1):
        for who, load in calls.items():
            rank = number % _LOADED_BY
            state = columns_of(shape, tensors, rank, _LOADED_BY)
            took = _timed(partial(load, state, path))[0]
            if not is_loaded(state, shape, rank, _LOADED_BY):
                raise RuntimeError(f"{who}: what was loaded is not what was saved")
            seconds[who] += [took] * (number > 0)  # the first one warms the page cache up
    return ReshardSample(
        nbytes=shape[0] * shape[1] * 4 * tensors,
        tensors=tensors,
        saved_by=_SAVED_BY,
        loaded_by=_LOADED_BY,
        ours_s=seconds["ours"],
        stock_s=seconds["stock"],
    )


def _load_stock(state: dict[str, Any], path: Path) -> None:
    stock.load(state, checkpoint_id=path)
