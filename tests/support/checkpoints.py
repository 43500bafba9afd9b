"""Small checkpoints with everything in them, made without the code that saves."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import xxhash

from ckptd.checkpoint.indexing.columns import Index
from ckptd.checkpoint.indexing.index import encode_index
from ckptd.staging.dtypes import OBJECT, by_code, by_name
from ckptd.staging.image import scalar_record, tensor_record

FILES = ["__0_0.distcp", "__1_0.distcp"]
# name -> dtype, shape, boxes (offsets, sizes); or a plain value
CONTENT = {
    "model.w": ("float32", (4, 6), [((0, 0), (2, 6)), ((2, 0), (2, 6))]),
    "model.b": ("bfloat16", (300,), [((0,), (300,))]),
    "model.step": ("int64", (), [((), ())]),
    "model.deep": ("float8_e4m3fn", (1, 2, 1, 2, 1), [((0,) * 5, (1, 2, 1, 2, 1))]),
    "model.empty": ("uint16", (0, 3), [((0, 0), (0, 3))]),
    "epoch": 7,
    "list.0.nämé": "a string",
}
PATHS = [
    *[("model", "w"), ("model", "b"), ("model", "step"), ("model", "deep"), ("model", "empty")],
    *[("epoch",), ("list", 0, "nämé")],
]


def make_checkpoint() -> tuple[Index, dict[str, bytes]]:
    """Return an index of :data:`CONTENT` and the bytes of its files."""
    images = {file: bytearray(b"\xee" * 5) for file in FILES}
    rows, tensors = [], []
    for name, value in enumerate(CONTENT.values()):
        if not isinstance(value, tuple):
            tensors.append((OBJECT, (), 0))
            rows.append(_append(images, len(rows), (name, (), ()), (b"", scalar_record(value), b"")))
            continue
        dtype, shape, boxes = value
        code = by_name(dtype).code
        tensors.append((code, shape, name % 2))
        for offsets, sizes in boxes:
            record = tensor_record(code, sizes)
            data = np.random.default_rng(len(rows)).integers(0, 256, record.nbytes, np.uint8).tobytes()
            box = (name, offsets, sizes)
            rows.append(_append(images, len(rows), box, (record.prefix, data, record.suffix)))
    columns = list(zip(*rows, strict=True))
    index = Index(
        header={"checkpoint_id": "/tmp/some/where", "save_id": "a save"},
        names=list(CONTENT),
        paths=PATHS,
        dtype=np.array([code for code, _, _ in tensors], np.uint8),
        ndim=np.array([len(shape) for _, shape, _ in tensors], np.uint8),
        shape=_padded([shape for _, shape, _ in tensors]),
        requires_grad=np.array([grad for _, _, grad in tensors], np.uint8),
        item_name=np.array(columns[0], np.int64),
        item_offsets=_padded(columns[1]),
        item_sizes=_padded(columns[2]),
        files=FILES,
        item_file=np.array(columns[3], np.int32),
        record_offset=np.array(columns[4], np.int64),
        record_bytes=np.array(columns[5], np.int64),
        data_offset=np.array(columns[6], np.int64),
        data_bytes=np.array(columns[7], np.int64),
        item_hash=np.array(columns[8], np.uint64),
    )
    return index, {file: bytes(image) for file, image in images.items()}


def write_checkpoint(folder: Path) -> Index:
    """Put a checkpoint with ``.ckptd`` and no ``.metadata`` into a folder."""
    index, images = make_checkpoint()
    for file, image in images.items():
        (folder / file).write_bytes(image)
    (folder / ".ckptd").write_bytes(encode_index(index))
    return index


def _append(images, row, box, parts):
    file = row % len(FILES)
    image = images[FILES[file]]
    begin = len(image)
    image += b"".join(parts)
    prefix, data, _ = parts
    places = (file, begin, len(image) - begin, begin + len(prefix), len(data))
    return (*box, *places, xxhash.xxh3_64_intdigest(data))


def _padded(boxes):
    return np.array([(*box, *[0] * (5 - len(box))) for box in boxes], np.int64)


def many_items(count: int) -> Index:
    """Return an index of ``count`` two-dimensional tensors of one chunk each."""
    sizes = np.tile(np.array([[16, 8]]), (count, 1))
    data_bytes = np.full(count, math.prod((16, 8)) * by_code(by_name("float32").code).itemsize_bytes)
    record_offset = np.arange(count) * 2048 * (1 << 20)
    names = [f"model.layers.{row}.weight" for row in range(count)]
    return Index(
        header={},
        names=names,
        paths=[tuple(name.split(".")) for name in names],
        dtype=np.full(count, by_name("float32").code, np.uint8),
        ndim=np.full(count, 2, np.uint8),
        shape=sizes,
        requires_grad=np.zeros(count, np.uint8),
        item_name=np.arange(count),
        item_offsets=np.zeros((count, 2), np.int64),
        item_sizes=sizes,
        files=FILES,
        item_file=(np.arange(count) % 2).astype(np.int32),
        record_offset=record_offset,
        record_bytes=data_bytes + 700,
        data_offset=record_offset + 300,
        data_bytes=data_bytes,
        item_hash=np.arange(count, dtype=np.uint64),
    )


def as_dict(index: Index) -> dict[str, object]:
    """Return an index in a form that ``==`` can compare."""
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(index).items()}


def items_of(index: Index) -> set[tuple[object, ...]]:
    """Return what an index says of each item's place, without the order of items and files."""
    places = zip(
        [index.names[row] for row in index.item_name],
        map(tuple, index.item_offsets.tolist()),
        map(tuple, index.item_sizes.tolist()),
        [index.files[row] for row in index.item_file],
        index.record_offset.tolist(),
        index.record_bytes.tolist(),
        strict=True,
    )
    return set(places)
