"""Checkpoints as a manager saves them, made without a daemon: small, whole, with what the user said of them."""

from __future__ import annotations

import os
from pathlib import Path

from support.checkpoints import make_checkpoint

from ckptd.checkpoint.folder.catalog import CatalogEntry
from ckptd.checkpoint.folder.user_data import USER_DATA, UserData
from ckptd.checkpoint.image.frame import frame_hash, frame_header, frame_ranges
from ckptd.checkpoint.indexing.index import encode_index
from ckptd.checkpoint.indexing.open import read_index


def write_managed(root: Path, step: int, *, committed_s: float | None = None, name: str = "", **metrics: float) -> Path:
    """Put a checkpoint of a step into a folder and return its directory."""
    path = root / (name or f"step-{step}")
    path.mkdir(parents=True)
    index, images = make_checkpoint()
    for file, image in images.items():
        (path / file).write_bytes(image)
    index.header[USER_DATA] = UserData(step, metrics).encode()
    index.header.update(frame_header([_frame_hash(index, row, images[file]) for row, file in enumerate(index.files)]))
    (path / ".ckptd").write_bytes(encode_index(index))
    (path / ".metadata").write_bytes(b"stock's")
    if committed_s is not None:
        os.utime(path / ".ckptd", (committed_s, committed_s))
    return path


def _frame_hash(index, row, image):
    mine = index.item_file == row
    ranges = frame_ranges(index.data_offset[mine], index.data_bytes[mine], len(image))
    return frame_hash(ranges, lambda begin, end: image[begin:end])


def spoil(path: Path, how: str = "bit", *, item: str = "model.w") -> None:
    """Damage a checkpoint in one of some ways."""
    index = read_index(str(path))
    row = [index.names[name] for name in index.item_name].index(item)
    file = path / index.files[index.item_file[row]]
    if how == "bit":
        data = bytearray(file.read_bytes())
        data[int(index.data_offset[row])] ^= 4
        file.write_bytes(data)
    elif how == "missing":
        file.unlink()
    elif how == "truncated":
        os.truncate(file, int(index.data_offset[row]) + 1)
    elif how == "index":
        os.truncate(path / ".ckptd", 100)
    elif how == "no index":
        (path / ".ckptd").unlink()
        (path / ".metadata").unlink()


def entry(step: int | None, *, committed_s: float = 0.0, name: str = "", **facts: object) -> CatalogEntry:
    """Return what a listing tells of a checkpoint that a manager saved."""
    metrics = facts.pop("metrics", {})
    values = {"complete": True, "managed": True, "user": UserData(step or 0, metrics), **facts}
    return CatalogEntry(f"/runs/{name or f'step-{step}'}", step, committed_s, **values)


def names(root: Path) -> list[str]:
    """Return what lies in a folder, hidden things included."""
    return sorted(os.listdir(root))
