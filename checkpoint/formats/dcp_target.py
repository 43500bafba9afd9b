"""Writes a checkpoint of ours: aligned images, an index with hashes, stock's metadata, one rename.

Boxes stay as the source has them, and what lay in one file of a checkpoint lies in one image again, so that ranks read
side by side as before. Images are written from beginning to end, tensor by tensor. Knows no torch.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from xxhash import xxh3_64, xxh3_64_intdigest

from ckptd import __version__
from ckptd.checkpoint.formats.output import check_free, new_file
from ckptd.checkpoint.formats.source import Box, Entry, Source
from ckptd.checkpoint.image.layout import Layout, item_record
from ckptd.checkpoint.names import hidden_directory, image_name
from ckptd.checkpoint.planning.items import LOWEST_RANK, LocalPlan
from ckptd.checkpoint.planning.plan import JobPlan, make_plan
from ckptd.checkpoint.planning.planfile import RankRows, StoredPlan
from ckptd.checkpoint.publishing.commit import commit, prepare_directory
from ckptd.checkpoint.publishing.leftovers import discard_save
from ckptd.protocol.messages import CommitTask

Item = tuple[Entry, Box]


@dataclass(frozen=True)
class _Part:
    """What goes into one image: its items, and the plan over them."""

    items: list[Item]
    objects: dict[str, bytes]
    plan: LocalPlan


@dataclass(frozen=True)
class _Image:
    """What became of one image."""

    hashes: bytes
    frame_hash: int
    object_bytes: bytes


def write_checkpoint(source: Source, path: str, *, overwrite: bool, done: Callable[[int], None]) -> None:
    """Write all of a source as a checkpoint.

    Args:
        source: What to write; its objects are copied as they are, without unpickling them.
        path: The checkpoint's directory.
        overwrite: Whether an existing checkpoint is replaced.
        done: Called with bytes of tensors written.

    Raises:
        BadPlan: The source's boxes leave a gap or overlap.
        OutputExists, StorageError, Unsupported: Nothing was changed.
    """
    path = os.path.abspath(path)
    check_free(path, overwrite=overwrite)
    parts = [_make_part(source, items) for items in _items_by_file(source)]
    job = make_plan([part.plan for part in parts])
    save_id = secrets.token_hex(16)
    directory = hidden_directory(path, save_id)
    prepare_directory(directory)
    try:
        images = [
            _write_image(source, part, job.layouts[rank], os.path.join(directory, image_name(rank)), done)
            for rank, part in enumerate(parts)
        ]
        commit(_stored(job, source), _task(path, directory, save_id, images, source, overwrite=overwrite))
    except BaseException:
        discard_save(directory)
        raise


def _items_by_file(source: Source) -> list[list[Item]]:
    """Return the boxes of a source, those of one file together and in the file's order."""
    files: dict[str, list[Item]] = {}
    for entry in source.entries:
        for box in entry.boxes:
            files.setdefault(source.place(entry, box), []).append((entry, box))
    for items in files.values():
        items.sort(key=lambda item: source.position(item[1]))
    # __2_0 before __10_0
    return [files[file] for file in sorted(files, key=lambda file: (len(file), file))] or [[]]


def _make_part(source: Source, items: list[Item]) -> _Part:
    """Return the plan over some items, as a rank would make it that holds them."""
    entries = list({entry.name: entry for entry, _ in items}.values())
    position = {entry.name: row for row, entry in enumerate(entries)}
    objects = {entry.name: source.object_bytes(entry) for entry in entries if entry.is_object}
    dimensions = max((len(entry.shape) for entry in entries), default=0)

    def matrix(rows: list[tuple[int, ...]]) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        padded = [row + (0,) * (dimensions - len(row)) for row in rows]
        return np.array(padded, np.int64).reshape(len(rows), dimensions)

    plan = LocalPlan(
        settings=LOWEST_RANK,
        names=[entry.name for entry in entries],
        paths=[entry.path for entry in entries],
        dtype=np.array([entry.dtype for entry in entries], np.uint8),
        ndim=np.array([len(entry.shape) for entry in entries], np.uint8),
        shape=matrix([entry.shape for entry in entries]),
        requires_grad=np.array([entry.requires_grad for entry in entries], np.uint8),
        item_name=np.array([position[entry.name] for entry, _ in items], np.int64),
        item_offsets=matrix([box.offsets for _, box in items]),
        item_sizes=matrix([box.sizes for _, box in items]),
        capacity=np.array([len(objects.get(entry.name, b"")) for entry, _ in items], np.int64),
    )
    return _Part(items, objects, plan)


def _write_image(source: Source, part: _Part, layout: Layout, path: str, done: Callable[[int], None]) -> _Image:
    hashes: list[int] = []
    lengths: list[int] = []
    with new_file(path, overwrite=False) as file:
        frame = _Frame(file)
        for row, item in enumerate(layout.item.tolist()):
            entry, box = part.items[item]
            frame.fill_to(int(layout.record_offset[row]))
            if entry.is_object:
                data = part.objects[entry.name]
                file.write(data)
                hashes.append(xxh3_64_intdigest(data))
                lengths.append(len(data))
                frame.end += len(data)
                continue
            record = item_record(part.plan, item)
            frame.put(record.prefix)
            digest = xxh3_64()
            for piece in source.pieces(entry, box):
                file.write(piece)
                digest.update(piece)
                done(len(piece))
            hashes.append(digest.intdigest())
            frame.end += record.nbytes
            frame.put(record.suffix)
        frame.fill_to(layout.image_bytes)
    return _Image(np.array(hashes, "<u8").tobytes(), frame.digest.intdigest(), np.array(lengths, "<i8").tobytes())


class _Frame:
    """The bytes around the payloads, written and hashed in order; see :mod:`ckptd.checkpoint.image.frame`."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = xxh3_64()
        self.end = 0

    def put(self, data: bytes) -> None:
        """Write some of them."""
        self._file.write(data)
        self.digest.update(data)
        self.end += len(data)

    def fill_to(self, offset: int) -> None:
        """Write zeros up to an offset of the file."""
        self.put(bytes(offset - self.end))


def _stored(job: JobPlan, source: Source) -> StoredPlan:
    """Return the plan in the form that a commit takes, with the names in the order of the source."""
    ranks = [
        RankRows(layout.data_offset, layout.data_bytes, objects, rows)
        for layout, objects, rows in zip(job.layouts, job.is_object, job.index_rows, strict=True)
    ]
    index = job.index
    position = {name: row for row, name in enumerate(index.names)}
    order = np.array([position[entry.name] for entry in source.entries], np.int64)
    rank_of = np.argsort(order)
    in_order = dataclasses.replace(
        index,
        names=[index.names[row] for row in order.tolist()],
        paths=[index.paths[row] for row in order.tolist()],
        dtype=index.dtype[order],
        ndim=index.ndim[order],
        shape=index.shape[order],
        requires_grad=index.requires_grad[order],
        item_name=rank_of[index.item_name],
    )
    return StoredPlan(in_order, ranks)


def _task(
    path: str, directory: str, save_id: str, images: list[_Image], source: Source, *, overwrite: bool
) -> CommitTask:
    return CommitTask(
        plan_path="",
        directory=directory,
        checkpoint_id=path,
        save_id=save_id,
        hashes=[image.hashes for image in images],
        frame_hashes=[image.frame_hash for image in images],
        object_bytes=[image.object_bytes for image in images],
        overwrite=overwrite,
        header={
            "version": __version__,
            "origin": "ckptd convert",
            "source": os.path.abspath(source.path),
            "save_id": save_id,
            "world_size": str(len(images)),
        },
    )
