"""What is known of each item: where its values lie in the file and, from ``.ckptd``, their hash."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from ckptd.checkpoint.indexing.columns import Index
from ckptd.checkpoint.indexing.index import decode_index
from ckptd.checkpoint.indexing.open import is_metadata_of
from ckptd.checkpoint.stock.metadata import torch_dtype
from ckptd.protocol.errors import WrongBits
from ckptd.staging.dtypes import OBJECT

Key = tuple[str, tuple[int, ...] | None]


@dataclass(frozen=True)
class Known:
    """One item.

    Attributes:
        offset: Where its values begin in the file, in bytes.
        nbytes: Their length.
        item_hash: xxh3-64 of them; None where there is no index.
        dtype: None for an object.
        sizes: In elements.
    """

    offset: int
    nbytes: int
    item_hash: int | None
    dtype: torch.dtype | None
    sizes: tuple[int, ...]


class KnownPayloads:
    """The items of one index, by key."""

    def __init__(self, items: dict[Key, Known]) -> None:
        self._items = items

    @classmethod
    def none(cls) -> KnownPayloads:
        """Return what is known of a checkpoint without an index."""
        return cls({})

    def of(self, index: MetadataIndex) -> Known | None:
        """Return what is known of an item."""
        return self._items.get((index.fqn, None if index.offset is None else tuple(index.offset)))


def payloads_of(sidecar: bytes, metadata: Metadata, data: bytes, *, path: str) -> KnownPayloads:
    """Return what an index knows of a checkpoint, or nothing if it is another save's.

    Args:
        sidecar: The bytes of ``.ckptd``.
        metadata: The metadata beside it.
        data: The bytes of that.
        path: The index's, for errors.

    Raises:
        BadIndex: The index is damaged.
        WrongBits: The metadata is: it is not what was saved with the index, but no other save's either.
    """
    index = decode_index(sidecar, path)
    if not is_metadata_of(index, data):
        if _same_save(index, metadata):
            raise WrongBits(f"{path.removesuffix('.ckptd')}.metadata", "(stock metadata)", 0)
        return KnownPayloads.none()
    return KnownPayloads(_items(index)) if index.has_hashes else KnownPayloads.none()


def _same_save(index: Index, metadata: Metadata) -> bool:
    """Return whether bits have turned in the metadata, or else another save has replaced it and left our index behind.

    One wrong bit changes the name of the save or a place, never both; another save has another of each.
    """
    save_id = getattr(metadata.storage_meta, "save_id", None)
    if save_id == index.header.get("save_id"):
        return True
    found = {(p.relative_path, p.offset, p.length) for p in (metadata.storage_data or {}).values()}
    files = [index.files[row] for row in index.item_file.tolist()]
    return found == set(zip(files, index.record_offset.tolist(), index.record_bytes.tolist(), strict=True))


def _items(index: Index) -> dict[Key, Known]:
    dtypes = {code: torch_dtype(code) for code in set(index.dtype.tolist()) - {OBJECT}}
    columns = (
        index.item_name.tolist(),
        index.item_offsets.tolist(),
        index.item_sizes.tolist(),
        index.data_offset.tolist(),
        index.data_bytes.tolist(),
        index.item_hash.tolist(),
    )
    codes, ndims = index.dtype.tolist(), index.ndim.tolist()
    items: dict[Key, Known] = {}
    for name, offsets, sizes, begin, nbytes, item_hash in zip(*columns, strict=True):
        dtype, ndim = dtypes.get(codes[name]), ndims[name]
        key = (index.names[name], None if dtype is None else tuple(offsets[:ndim]))
        items[key] = Known(begin, nbytes, item_hash, dtype, tuple(sizes[:ndim]))
    return items
