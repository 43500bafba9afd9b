"""What a tool writes appears whole or not at all: a hidden sibling, fsync, one rename.

Nothing that exists is replaced unless the caller says so, and then in one step.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from ckptd.checkpoint.names import hidden_directory
from ckptd.checkpoint.publishing.commit import discard, prepare_directory
from ckptd.checkpoint.system import named, rename_exchange, rename_new, sync_directory
from ckptd.protocol.errors import BadConfig, OutputExists, SystemCallFailed

# Large enough that the writes of small tensors are gathered.
_BUFFER_BYTES = 1 << 20


def check_free(path: str, *, overwrite: bool) -> None:
    """Raise OutputExists if a path is taken; a tool asks before it begins to work."""
    if not overwrite and os.path.lexists(path):
        raise OutputExists(path)


@contextmanager
def new_file(path: str, *, overwrite: bool) -> Iterator[BinaryIO]:
    """Yield a file that gets its name when the block ends well, and is removed otherwise.

    Raises:
        OutputExists: The name is taken.
        SystemCallFailed: A call failed; what was there before is still there.
    """
    path = os.path.abspath(path)
    check_free(path, overwrite=overwrite)
    if os.path.isdir(path):
        raise SystemCallFailed("open", path, errno.EISDIR)
    temporary = hidden_directory(path, secrets.token_hex(8))
    try:
        with named("open", path, lambda: open(temporary, "xb", buffering=_BUFFER_BYTES)) as file:
            yield file
            named("fsync", path, lambda: _flush(file))
        _give_name(temporary, path, overwrite=overwrite)
    except OSError as error:  # a write of the block's
        _remove(temporary)
        raise SystemCallFailed("write", path, error.errno or errno.EIO) from None
    except BaseException:  # also on KeyboardInterrupt: leave no half files behind
        _remove(temporary)
        raise
    sync_directory(os.path.dirname(path))


@contextmanager
def new_folder(path: str, *, overwrite: bool, ours: tuple[str, ...]) -> Iterator[str]:
    """Yield a hidden folder that gets its name when the block ends well, and is removed otherwise.

    Args:
        path: The name.
        overwrite: Whether a folder of this name is replaced.
        ours: How the names of files end that may be lost when it is.

    Raises:
        OutputExists: The name is taken.
        BadConfig: The folder to be replaced holds files of another kind.
        SystemCallFailed: A call failed; what was there before is still there.
    """
    path = os.path.abspath(path)
    check_free(path, overwrite=overwrite)
    _check_folder(path, ours)
    temporary = hidden_directory(path, secrets.token_hex(8))
    prepare_directory(temporary)
    try:
        yield temporary
        sync_directory(temporary)
        _give_name(temporary, path, overwrite=overwrite)
    except OSError as error:
        discard(temporary)
        raise SystemCallFailed("write", path, error.errno or errno.EIO) from None
    except BaseException:
        discard(temporary)
        raise
    sync_directory(os.path.dirname(path))
    discard(temporary)  # what was there before


def _check_folder(path: str, ours: tuple[str, ...]) -> None:
    if not os.path.lexists(path):
        return
    if not os.path.isdir(path) or os.path.islink(path):
        raise SystemCallFailed("rename", path, errno.ENOTDIR)
    foreign = sorted(name for name in os.listdir(path) if not name.endswith(ours))
    if foreign:
        raise BadConfig(path, f"it holds {foreign[0]}, which would be lost; choose a new folder")


def _give_name(temporary: str, path: str, *, overwrite: bool) -> None:
    if not os.path.lexists(path):
        try:
            if not rename_new(temporary, path):
                named("rename", path, lambda: os.rename(temporary, path))
        except SystemCallFailed as error:
            if error.errno != errno.EEXIST or not overwrite:
                raise OutputExists(path) if error.errno == errno.EEXIST else error from None
        else:
            return
    if not overwrite:
        raise OutputExists(path)
    if not os.path.isdir(temporary):
        named("rename", path, lambda: os.replace(temporary, path))
    elif not rename_exchange(temporary, path):
        old = f"{temporary}.old"
        named("rename", path, lambda: os.rename(path, old))
        named("rename", path, lambda: os.rename(temporary, path))
        discard(old)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _remove(path: str) -> None:
    if os.path.lexists(path):
        os.unlink(path)
