"""A directory as a store of files: for ranks that save apart from each other into one directory.

That is stock's ``use_collectives=False``: nobody speaks for all ranks, so nobody could rename the directory.
"""

from __future__ import annotations

import os

from ckptd.checkpoint.storage.posix_sink import PosixSink
from ckptd.checkpoint.system import named, sync_directory, write_file


class FolderStore:
    """The files of one directory; made with the first of them."""

    def __init__(self, path: str, *, sync: bool) -> None:
        self._path, self._sync = path, sync

    def url(self, name: str) -> str:
        """Return the path of a file."""
        return os.path.join(self._path, name)

    def create(self, name: str, *, expected_bytes: int) -> PosixSink:
        """Begin a new file. Raises SystemCallFailed."""
        self._prepare()
        return PosixSink(self.url(name), sync=self._sync, expected_bytes=expected_bytes)

    def put(self, name: str, data: bytes) -> None:
        """Make or replace a file by a rename, durably. Raises SystemCallFailed."""
        self._prepare()
        temporary = self.url(f".{name}.{os.getpid()}.tmp")
        try:
            write_file(temporary, data)
            named("rename", self.url(name), lambda: os.replace(temporary, self.url(name)))
        except BaseException:
            if os.path.lexists(temporary):
                os.unlink(temporary)
            raise
        sync_directory(self._path)

    def read(self, name: str) -> bytes | None:
        """Return a file's bytes, or None. Raises SystemCallFailed."""

        def read() -> bytes | None:
            try:
                with open(self.url(name), "rb") as file:
                    return file.read()
            except (FileNotFoundError, NotADirectoryError):
                return None

        return named("read", self.url(name), read)

    def size(self, name: str) -> int | None:
        """Return a file's size in bytes, or None. Raises SystemCallFailed."""

        def size() -> int | None:
            try:
                return os.stat(self.url(name)).st_size
            except (FileNotFoundError, NotADirectoryError):
                return None

        return named("stat", self.url(name), size)

    def list(self) -> list[str]:
        """Return the names in the directory. Raises SystemCallFailed."""

        def names() -> list[str]:
            try:
                return sorted(os.listdir(self._path))
            except FileNotFoundError:
                return []

        return named("listdir", self._path, names)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there. Raises SystemCallFailed."""

        def remove() -> None:
            try:
                os.unlink(self.url(name))
            except FileNotFoundError:
                return

        named("unlink", self.url(name), remove)

    def _prepare(self) -> None:
        named("mkdir", self._path, lambda: os.makedirs(self._path, exist_ok=True))
