"""Which checkpoints lie in a folder, told from names, directories and headers: no column of an index is read.

Loads neither torch nor numpy: a listing of a thousand checkpoints takes a thousand small reads.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass, field
from typing import Final

from ckptd.checkpoint.folder.steps import newest_first, step_of
from ckptd.checkpoint.folder.user_data import UserData, decode_user_data
from ckptd.checkpoint.names import INDEX_NAME, METADATA_NAME, PIN_NAME, is_checkpoint_file
from ckptd.checkpoint.system import named

# The head of an index has an entry per column and a frame hash per file; 100,000 files are 2 MB.
_MOST_HEAD_BYTES: Final = 64 << 20


@dataclass(frozen=True)
class CatalogEntry:
    """A directory that holds a checkpoint, or what is left of one.

    Attributes:
        path: The directory.
        step: By its user data, or else by its name; None if neither tells one.
        committed_unix_s: When index or metadata were written, in seconds since 1970.
        complete: Whether index or metadata and as many images as there should be are there.
        pinned: Whether retention must leave it alone.
        managed: Whether a checkpoint manager saved it, and it still has the name that it was saved under.
        user: What its user says of it.
    """

    path: str
    step: int | None
    committed_unix_s: float
    complete: bool
    pinned: bool = False
    managed: bool = False
    user: UserData | None = field(default=None, compare=False)  # a metric may be NaN, which equals nothing

    @property
    def name(self) -> str:
        """Name of the directory."""
        return os.path.basename(self.path)


def list_entries(root: str) -> list[CatalogEntry]:
    """Return the checkpoints in a folder, the newest first; links and hidden directories are left out.

    Raises:
        SystemCallFailed: The folder cannot be read; one that is not there holds none.
    """

    def scan() -> list[str]:
        try:
            with os.scandir(root) as found:
                return [e.path for e in found if not e.name.startswith(".") and e.is_dir(follow_symlinks=False)]
        except FileNotFoundError:
            return []

    entries = [look_at(path) for path in named("scandir", root, scan)]
    return newest_first(entry for entry in entries if entry is not None)


def look_at(path: str) -> CatalogEntry | None:
    """Return what can be told of a directory; None if nothing in it belongs to a checkpoint, or it is gone."""
    try:
        names = set(os.listdir(path))
    except OSError:
        return None
    if not any(map(is_checkpoint_file, names)):
        return None
    header = read_header(path) if INDEX_NAME in names else None
    user = None if header is None else decode_user_data(header)
    name_step = step_of(os.path.basename(path))
    return CatalogEntry(
        path,
        name_step if user is None else user.step,
        _committed_unix_s(path),
        _is_complete(names, header),
        PIN_NAME in names,
        user is not None and user.step == name_step,
        user,
    )


def read_header(path: str) -> dict[str, str] | None:
    """Return the header of a checkpoint's index without its columns; None if there is none that can be read."""
    try:
        with open(os.path.join(path, INDEX_NAME), "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            head = file.read(length) if length <= _MOST_HEAD_BYTES else b""
        header = json.loads(json.loads(head)["__metadata__"]["header"])
        return {str(key): str(value) for key, value in header.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _is_complete(names: set[str], header: dict[str, str] | None) -> bool:
    if INDEX_NAME not in names:
        return METADATA_NAME in names  # stock writes it last
    if header is None:
        return False
    try:
        files = len(json.loads(header.get("frame_hashes", "[]")))
    except (ValueError, TypeError):
        return False
    return sum(name.endswith(".distcp") for name in names) >= files


def _committed_unix_s(path: str) -> float:
    for name in (INDEX_NAME, METADATA_NAME, ""):
        with contextlib.suppress(OSError):
            return os.stat(os.path.join(path, name)).st_mtime
    return 0.0
