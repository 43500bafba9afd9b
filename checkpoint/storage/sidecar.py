"""From metadata and results to the two files that end a save: stock's ``.metadata`` and our ``.ckptd``."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Iterable, Sequence

import numpy as np
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult
from xxhash import xxh3_64_intdigest

from ckptd.checkpoint.image.frame import METADATA_HASH, frame_header
from ckptd.checkpoint.indexing.columns import Index
from ckptd.checkpoint.indexing.index import encode_index
from ckptd.checkpoint.stock.metadata_pickle import DCP_VERSION
from ckptd.checkpoint.stock.metadata_unpickle import collector_paused, decode_metadata
from ckptd.checkpoint.storage.placement import FileReport, PlacedItem
from ckptd.protocol.errors import BadIndex, ItemNotReported, Unsupported
from ckptd.staging.dtypes import OBJECT

Key = tuple[str, tuple[int, ...] | None]


def complete_metadata(metadata: Metadata, results: Sequence[Sequence[WriteResult]]) -> None:
    """Put into the metadata where everything lies.

    Raises:
        ItemNotReported: It names something that nobody has written.
    """
    placed = {result.index: result.storage_data for of_rank in results for result in of_rank}
    for index in _named(metadata):
        if index not in placed:
            raise ItemNotReported(index.fqn if index.offset is None else f"{index.fqn} at {tuple(index.offset)}")
    metadata.version = DCP_VERSION
    metadata.storage_data = {
        index: place.plain() if isinstance(place, PlacedItem) else place for index, place in placed.items()
    }


def _named(metadata: Metadata) -> Iterable[MetadataIndex]:
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            yield MetadataIndex(name)
        else:
            yield from (MetadataIndex(name, chunk.offsets) for chunk in entry.chunks)


def file_reports(results: Sequence[Sequence[WriteResult]]) -> dict[str, FileReport]:
    """Return what was reported of each file."""
    reports = {}
    for of_rank in results:
        for result in of_rank:
            file = getattr(result.storage_data, "file", None)
            if file is not None:
                reports[file.name] = file
    return reports


def encode_stock(metadata: Metadata) -> bytes:
    """Return the bytes of ``.metadata``."""
    with collector_paused():
        return pickle.dumps(metadata, protocol=4)


def encode_sidecar(data: bytes, results: Sequence[Sequence[WriteResult]], *, header: dict[str, str]) -> bytes | None:
    """Return the bytes of ``.ckptd``; None where it cannot tell all: transformed records, unusual tensors or keys.

    Args:
        data: The bytes of ``.metadata``, which it stands beside.
        results: What the ranks have written.
        header: Origin and the like.
    """
    placed: dict[Key, PlacedItem] = {}
    for of_rank in results:
        for result in of_rank:
            place, key = result.storage_data, _key(result.index)
            if not isinstance(place, PlacedItem) or place.data_bytes < 0 or key in placed:
                return None
            placed[key] = place
    try:
        return encode_index(_with_payloads(decode_metadata(data, ".metadata"), placed, header, data))
    except (BadIndex, Unsupported):
        return None


def _with_payloads(index: Index, placed: dict[Key, PlacedItem], header: dict[str, str], data: bytes) -> Index:
    ndim = index.ndim[index.item_name].tolist()
    is_object = (index.dtype[index.item_name] == OBJECT).tolist()
    rows = zip(index.item_name.tolist(), index.item_offsets.tolist(), ndim, is_object, strict=True)
    items = [
        placed[index.names[name], None if an_object else tuple(offsets[:dimensions])]
        for name, offsets, dimensions, an_object in rows
    ]
    files = {item.file.name: item.file for item in items if item.file is not None}
    hashes = [files[name].frame_hash for name in index.files]
    return dataclasses.replace(
        index,
        header={**header, **frame_header(hashes), METADATA_HASH: f"{xxh3_64_intdigest(data):016x}"},
        data_offset=np.array([item.data_offset for item in items], np.int64),
        data_bytes=np.array([item.data_bytes for item in items], np.int64),
        item_hash=np.array([item.item_hash for item in items], np.uint64),
    )


def _key(index: MetadataIndex) -> Key:
    return index.fqn, None if index.offset is None else tuple(index.offset)
