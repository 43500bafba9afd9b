"""The names of a checkpoint's files. Pure text, so that the daemon can use them without loading numpy."""

from __future__ import annotations

import os
import re
from typing import Final

INDEX_NAME: Final = ".ckptd"
METADATA_NAME: Final = ".metadata"
_HIDDEN: Final = re.compile(r"\.(.+)\.ckptd-(.+)", re.DOTALL)


def image_name(rank: int) -> str:
    """Return the name of a rank's image, as stock names it."""
    return f"__{rank}_0.distcp"


def hidden_directory(checkpoint_id: str, save_id: str) -> str:
    """Return where a save's files lie until it is published: a hidden sibling, so on the same volume."""
    parent, name = os.path.split(checkpoint_id)
    return os.path.join(parent, f".{name}.ckptd-{save_id}")


def parse_hidden(name: str) -> tuple[str, str] | None:
    """Return the checkpoint's name and the save's id of a hidden directory's name; None if it is none."""
    found = _HIDDEN.fullmatch(name)
    return (found[1], found[2]) if found else None


def is_checkpoint_file(name: str) -> bool:
    """Return whether a file belongs to a checkpoint, ours or stock's, and not to its user."""
    return name in {INDEX_NAME, METADATA_NAME} or name.endswith(".distcp")


def is_canonical(checkpoint_id: str) -> bool:
    """Return whether an id is an absolute path in its shortest form, below the root."""
    return (
        os.path.isabs(checkpoint_id)
        and os.path.normpath(checkpoint_id) == checkpoint_id
        and checkpoint_id != "/"
        and "\0" not in checkpoint_id
    )
