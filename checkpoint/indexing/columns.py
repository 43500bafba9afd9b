"""A checkpoint as columns: every tensor and object that it holds, and where. Nothing but the type.

A million items are a dozen numpy arrays and one list of names, so that plans, formats and checks can work on
whole columns. The rules that make an index usable are in :mod:`ckptd.checkpoint.indexing.check`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

UInt8 = NDArray[np.uint8]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
UInt64 = NDArray[np.uint64]
KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, eq=False)
class Index:
    """A whole checkpoint: ``N`` names, ``M`` items (chunks and objects), ``D`` dimensions at most.

    Attributes:
        header: Origin and the like; free text.
        names: The keys of the flat state dict, N.
        paths: Where each name stands in the nested state dict (DCP's ``planner_data``), N.
        dtype: uint8[N], codes of :mod:`ckptd.staging.dtypes`; ``OBJECT`` for objects.
        ndim: uint8[N]; 0 for objects.
        shape: int64[N, D] in elements, zero behind ``ndim``.
        requires_grad: uint8[N], 0 or 1.
        item_name: int64[M], row of the item's name.
        item_offsets: int64[M, D] in elements, where the item begins in its tensor; zero behind ``ndim``.
        item_sizes: int64[M, D] in elements.
        files: Names within the checkpoint's directory, F.
        item_file: int32[M], position in ``files``.
        record_offset: int64[M], where the ``torch.save`` record begins in the file, in bytes.
        record_bytes: int64[M], its length.
        data_offset: int64[M], where the payload begins in the file; an object's payload is its record.
        data_bytes: int64[M], its length; -1 where only the record would tell (a stock checkpoint's tensors).
        item_hash: uint64[M], xxh3-64 of the payload; empty if the checkpoint has no hashes (a stock one).
    """

    header: dict[str, str]
    names: list[str]
    paths: list[KeyPath]
    dtype: UInt8
    ndim: UInt8
    shape: Int64
    requires_grad: UInt8
    item_name: Int64
    item_offsets: Int64
    item_sizes: Int64
    files: list[str]
    item_file: Int32
    record_offset: Int64
    record_bytes: Int64
    data_offset: Int64
    data_bytes: Int64
    item_hash: UInt64

    @property
    def has_hashes(self) -> bool:
        """Whether the payloads can be verified."""
        return len(self.item_hash) == len(self.item_name)

    def file_ends(self) -> Int64:
        """Return how long each file must at least be, in bytes."""
        ends = np.zeros(len(self.files), np.int64)
        np.maximum.at(ends, self.item_file, self.record_offset + self.record_bytes)
        return ends
