"""A save into a place that cannot be renamed: each has file names of its own, and one last file publishes them.

Invariant: the last file names either the old files or the new ones. New ones are put before it, old ones go after it,
so that a reader, or a crash, in between finds one whole checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Mapping
from typing import Final, Protocol

from ckptd.checkpoint.names import INDEX_NAME, METADATA_NAME
from ckptd.checkpoint.storage.metadata_file import decode_stock
from ckptd.checkpoint.storage.sink import Sink
from ckptd.protocol.errors import BadIndex, CheckpointExists, CkptdError, MissingFile, WrongUpload

logger = logging.getLogger(__name__)

_FRESH_NAME: Final = re.compile(r"__\d+_\d+\.[0-9a-f-]{36}\.distcp")


class Store(Protocol):
    """A flat place for files. All methods raise a StorageError when they fail."""

    def url(self, name: str) -> str:
        """Return a file's name for messages."""

    def create(self, name: str, *, expected_bytes: int) -> Sink:
        """Begin a new file."""

    def put(self, name: str, data: bytes) -> None:
        """Make or replace a small file, in one step."""

    def read(self, name: str) -> bytes | None:
        """Return a small file's bytes; None if there is none."""

    def size(self, name: str) -> int | None:
        """Return a file's size in bytes; None if there is none."""

    def list(self) -> list[str]:
        """Return the names of all files."""

    def remove(self, name: str) -> None:
        """Remove a file; that it is gone already is no error."""


class FreshNames:
    """One save under way.

    Args:
        store: Where it goes.
        token: Names the save.
        prefix: Begin of this rank's files' names.
    """

    def __init__(self, store: Store, token: str, *, prefix: str) -> None:
        self._store, self._prefix = store, prefix
        self._end = f".{token}.distcp"
        self._created: set[str] = set()
        self._may_be_published = False

    def file_name(self, number: int) -> str:
        """Return a name that no other save has."""
        return f"{self._prefix}{number}{self._end}"

    def create(self, name: str, *, expected_bytes: int) -> Sink:
        """Begin a file."""
        self._created.add(name)
        return self._store.create(name, expected_bytes=expected_bytes)

    def check_files(self, sizes: Mapping[str, int]) -> None:
        """Check sizes in the store. Raises MissingFile, WrongUpload."""
        for name, nbytes in sizes.items():
            found = self._store.size(name)
            if found is None:
                raise MissingFile(self._store.url(name))
            if found != nbytes:
                raise WrongUpload(self._store.url(name), f"{nbytes} bytes", f"{found} bytes")

    def publish(self, metadata: tuple[str, bytes], *, sidecar: bytes | None, overwrite: bool) -> None:
        """Put the last file; then remove what the one before it named. See :class:`Publication`."""
        name, data = metadata
        old = self._store.read(name)
        if old is not None and not overwrite:
            raise CheckpointExists(self._store.url(""))
        before = self._store.read(INDEX_NAME)
        try:
            if sidecar is not None:
                self._store.put(INDEX_NAME, sidecar)
            self._put_last(name, data, old)
        except BaseException:
            if sidecar is not None and not self._may_be_published:
                self._put_back(INDEX_NAME, before)
            raise
        stale = _files_of(old)
        if name == METADATA_NAME:
            stale |= self._left_behind()
            stale |= {INDEX_NAME} if sidecar is None and before is not None else set()
        self._clear_away(stale - _files_of(data))

    def _put_last(self, name: str, data: bytes, old: bytes | None) -> None:
        """Put the last file. If that fails, what the store then holds decides: only the answer may have been lost."""
        self._may_be_published = True
        try:
            self._store.put(name, data)
        except CkptdError:
            found = self._store.read(name)  # if this fails, too, the files stay: the store may name them
            if found == data:
                return
            if found != old:
                self._put_back(name, old)
            self._may_be_published = False
            raise

    def _left_behind(self) -> set[str]:
        """Return the files of saves that were killed: what has a fresh name now was never published, or is ours."""
        try:
            names = self._store.list()
        except CkptdError as error:
            logger.warning("could not look for what killed saves have left behind: %s", error)
            return set()
        if any(name.startswith("__") and name.endswith(METADATA_NAME) for name in names):
            return set()  # ranks that saved apart have files here, each named by its own metadata
        return {name for name in names if _FRESH_NAME.fullmatch(name)}

    def _clear_away(self, names: set[str]) -> None:
        """Remove what nobody reads any more. The save is done: a failure here costs room, not the checkpoint."""
        for name in sorted(names):
            try:
                self._store.remove(name)
            except CkptdError as error:
                logger.warning("could not remove a file of the checkpoint that was replaced: %s", error)

    def _put_back(self, name: str, before: bytes | None) -> None:
        # What failed is on its way to the caller; an index that stays behind fits no metadata and is passed over.
        with contextlib.suppress(CkptdError):
            if before is None:
                self._store.remove(name)
            else:
                self._store.put(name, before)

    def discard(self) -> None:
        """Remove every file of this save, unless the store may have published it."""
        if self._may_be_published:
            return
        left = {name for name in self._store.list() if name.endswith(self._end)}
        for name in sorted(left | self._created):
            self._store.remove(name)


def _files_of(metadata: bytes | None) -> set[str]:
    """Return the data files that a metadata file names; none if it cannot be read: what is unknown stays."""
    if metadata is None:
        return set()
    try:
        storage = decode_stock(metadata, ".metadata").storage_data
    except BadIndex:
        return set()
    names = {getattr(place, "relative_path", None) for place in (storage or {}).values()}
    return {name for name in names if isinstance(name, str) and name.endswith(".distcp") and os.sep not in name}
