"""A save into a hidden sibling of the checkpoint's directory, published by one rename.

Invariant: under the id a reader finds the old checkpoint or the new one, whole. A lock that the kernel releases with
its process tells a save that is under way from the rest of one that was killed.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Final

from ckptd.checkpoint.names import INDEX_NAME, hidden_directory
from ckptd.checkpoint.publishing.commit import clear_away, discard, has_checkpoint, prepare_directory, publish
from ckptd.checkpoint.storage.posix_sink import PosixSink
from ckptd.checkpoint.system import named, sync_directory, write_file
from ckptd.protocol.errors import MissingFile, SystemCallFailed, TruncatedFile

logger = logging.getLogger(__name__)

# Apart from the daemon's own saves, whose ends the daemon watches over.
_TOKEN_PREFIX: Final = "api-"


def token_of(save_id: str) -> str:
    """Return the name of a save, from which all ranks find its directory."""
    return f"{_TOKEN_PREFIX}{save_id}"


class HiddenDirectory:
    """One save under way.

    Args:
        path: The directory that it will be, absolute and without symbolic links.
        token: Names the save.
        prefix: Begin of this rank's files' names.
        sync: Whether files are made durable.
    """

    def __init__(self, path: str, token: str, *, prefix: str, sync: bool) -> None:
        self.path, self.directory = path, hidden_directory(path, token)
        self._prefix, self._sync = prefix, sync

    def file_name(self, number: int) -> str:
        """Return the name of this rank's ``number``-th file, as stock gives it."""
        return f"{self._prefix}{number}.distcp"

    def create(self, name: str, *, expected_bytes: int) -> PosixSink:
        """Begin a file. Raises SaveAborted if another rank has failed and thrown the save away."""
        return PosixSink(os.path.join(self.directory, name), sync=self._sync, expected_bytes=expected_bytes)

    def check_files(self, sizes: Mapping[str, int]) -> None:
        """Check sizes on disk. Raises MissingFile, TruncatedFile."""
        for name, nbytes in sizes.items():
            path = os.path.join(self.directory, name)
            try:
                found = os.stat(path).st_size
            except FileNotFoundError:
                raise MissingFile(path) from None
            if found != nbytes:
                raise TruncatedFile(path, nbytes, found)

    def publish(self, metadata: tuple[str, bytes], *, sidecar: bytes | None, overwrite: bool) -> None:
        """Write the last files and rename the directory. Raises CheckpointExists, SystemCallFailed."""
        name, data = metadata
        if sidecar is not None:
            write_file(os.path.join(self.directory, INDEX_NAME), sidecar)
        write_file(os.path.join(self.directory, name), data)
        sync_directory(self.directory)
        publish(self.directory, self.path, overwrite=overwrite)
        try:
            clear_away(self.directory, self.path)
        except SystemCallFailed as error:  # the save is done: this costs room, not the checkpoint
            logger.warning("could not remove the checkpoint that was replaced: %s", error)

    def discard(self) -> None:
        """Remove the hidden directory, though other ranks may still be making files in it."""
        if has_checkpoint(self.directory):
            # Its name may have been given and taken back; after a power failure the id must not stand for its rest.
            sync_directory(os.path.dirname(self.directory))
        while True:
            try:
                discard(self.directory)
            except SystemCallFailed as error:
                if error.errno != errno.ENOTEMPTY:
                    raise
                continue  # a file was made while we removed the others; who made it finds no directory for the next
            return


def begin(directory: str) -> int:
    """Make the hidden directory of a save and lock it.

    Returns:
        The descriptor that holds the lock. Closing it, or the end of this process, gives it up.
    """
    prepare_directory(directory)
    try:
        descriptor = named("open", directory, lambda: os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except SystemCallFailed:
        with suppress(OSError):  # another rank writes into it already, and will remove it
            os.rmdir(directory)
        raise
    _lock(descriptor)
    return descriptor


def sweep(path: str) -> None:
    """Remove what killed saves of this id have left behind; what cannot be removed is left, for it harms nobody."""
    for left in list(_hidden(path)):
        try:
            descriptor = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue  # gone, or not ours to open
        try:
            if _lock(descriptor):
                discard(left)
        except SystemCallFailed as error:
            logger.warning("could not remove what a killed save has left behind: %s", error)
        finally:
            os.close(descriptor)


def find_token(path: str) -> str | None:
    """Return the token of the one save of this id that is under way, if there is exactly one."""
    found = list(_hidden(path))
    begin_of_name = os.path.basename(hidden_directory(path, ""))
    return os.path.basename(found[0])[len(begin_of_name) :] if len(found) == 1 else None


def _hidden(path: str) -> Iterator[str]:
    begin_of_name = os.path.basename(hidden_directory(path, _TOKEN_PREFIX))
    parent = os.path.dirname(path)
    try:
        entries = sorted(os.listdir(parent))
    except FileNotFoundError:
        return
    for entry in entries:
        # ".old" is a checkpoint that is being replaced where names cannot be exchanged: it may be the only one.
        if entry.startswith(begin_of_name) and (not entry.endswith(".old") or os.path.lexists(path)):
            yield os.path.join(parent, entry)


def _lock(descriptor: int) -> bool:
    """Take the lock; False if another process has it, whose save is under way, or where the file system has none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
