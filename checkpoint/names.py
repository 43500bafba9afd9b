"""The names of a checkpoint's files. Pure text, so that the daemon can use them without loading numpy."""

from __future__ import annotations

import os
import re
from typing import Final

INDEX_NAME: Final = ".ckptd"
METADATA_NAME: Final = ".metadata"
PIN_NAME: Final = ".pinned"  # in a checkpoint's directory: retention leaves it alone

_REMOVED: Final = "ckptd-removed-"
_UNFINISHED: Final = re.compile(r"\.(.+)\.ckptd-(?!removed-)[\w-]+(?:\.old)?")
_LEFTOVER: Final = re.compile(rf"\.(.+)\.{_REMOVED}[0-9a-f]+")

# What an old checkpoint is called while it is replaced, where two names cannot be exchanged in one step.
_SET_ASIDE: Final = ".old"


def image_name(rank: int) -> str:
    """Return the name of a rank's image, as stock names it."""
    return f"__{rank}_0.distcp"


def hidden_directory(checkpoint_id: str, save_id: str) -> str:
    """Return where a save's files lie until it is published: a hidden sibling, so on the same volume."""
    parent, name = os.path.split(checkpoint_id)
    return os.path.join(parent, f".{name}.ckptd-{save_id}")


def unfinished_save(name: str) -> str | None:
    """Return the name of the checkpoint that a hidden directory may become; None if it is no save's."""
    found = _UNFINISHED.fullmatch(name)
    return found[1] if found is not None else None


def removed_directory(checkpoint_id: str, token: str) -> str:
    """Return the hidden name that a checkpoint gets before its files are removed; ``token``: hexadecimal digits."""
    parent, name = os.path.split(checkpoint_id)
    return os.path.join(parent, f".{name}.{_REMOVED}{token}")


def is_removed(name: str) -> bool:
    """Return whether a directory's name says that its removal has begun."""
    return _LEFTOVER.fullmatch(name) is not None


def set_aside(directory: str) -> str:
    """Return where the old checkpoint waits while a save's hidden directory takes its name."""
    return directory + _SET_ASIDE


def split_hidden(path: str) -> tuple[str, str, bool] | None:
    """Take the path of a hidden directory apart.

    Returns:
        The checkpoint id, the save's id, and whether it is what was set aside; None if it is no such path.
    """
    parent, name = os.path.split(path)
    begin, found, save_id = name.removesuffix(_SET_ASIDE).rpartition(".ckptd-")
    if not (found and save_id and begin.startswith(".") and begin[1:]):
        return None
    return os.path.join(parent, begin[1:]), save_id, name.endswith(_SET_ASIDE)


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
