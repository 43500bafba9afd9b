"""Checkpoints as a manager saves them, made without a daemon: small, whole, with what the user said of them."""

from __future__ import annotations

import os
from pathlib import Path

from support.checkpoints import make_checkpoint

from ckptd.checkpoint.catalog import CatalogEntry
from ckptd.checkpoint.frame import frame_header
from ckptd.checkpoint.index import encode_index
from ckptd.checkpoint.user_data import USER_DATA, UserData


def write_managed(root: Path, step: int, *, committed_s: float | None = None, name: str = "", **metrics: float) -> Path:
    """Put a checkpoint of a step into a folder and return its directory."""
    path = root / (name or f"step-{step}")
    path.mkdir(parents=True)
    index, images = make_checkpoint()
    for file, image in images.items():
        (path / file).write_bytes(image)
    index.header[USER_DATA] = UserData(step, metrics).encode()
    index.header.update(frame_header([0] * len(images)))
    (path / ".ckptd").write_bytes(encode_index(index))
    (path / ".metadata").write_bytes(b"stock's")
    if committed_s is not None:
        os.utime(path / ".ckptd", (committed_s, committed_s))
    return path


def entry(step: int | None, *, committed_s: float = 0.0, name: str = "", **facts: object) -> CatalogEntry:
    """Return what a listing tells of a checkpoint that a manager saved."""
    metrics = facts.pop("metrics", {})
    values = {"complete": True, "managed": True, "user": UserData(step or 0, metrics), **facts}
    return CatalogEntry(f"/runs/{name or f'step-{step}'}", step, committed_s, **values)


def names(root: Path) -> list[str]:
    """Return what lies in a folder, hidden things included."""
    return sorted(os.listdir(root))
