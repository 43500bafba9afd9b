"""A store's objects as a source of byte ranges: loads from it merge, run in parallel and verify as others do."""

from __future__ import annotations

from collections.abc import Sequence

from ckptd.checkpoint.indexing.columns import Int64
from ckptd.checkpoint.reading.files import SourceFile
from ckptd.checkpoint.storage.object_store import ObjectStore
from ckptd.protocol.errors import MissingFile, TruncatedFile


class ObjectSource:
    """Where a load from a store gets its bytes."""

    name = "object store"

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def open(self, path: str, ranges: Sequence[tuple[int, int]]) -> SourceFile:
        """Open an object by its URL. Raises MissingFile, TruncatedFile, ObjectStoreFailed."""
        name = path.removeprefix(self._store.url(""))
        size = self._store.size(name)
        if size is None:
            raise MissingFile(path)
        needed = max((end for _, end in ranges), default=0)
        if size < needed:
            raise TruncatedFile(path, needed, size)
        return _Object(self._store, name)


class _Object:
    """One object; ranges are asked for by whoever needs them, each by a request of its own."""

    def __init__(self, store: ObjectStore, name: str) -> None:
        self.read_bytes = 0
        self._store, self._name = store, name

    def fill(self, begin: int, targets: Sequence[memoryview]) -> bool:
        """Return False: what a store sends lies in a buffer of its own."""
        del begin, targets
        return False

    def view(self, begin: int, end: int, bounce: memoryview) -> memoryview:
        """Return the bytes of a range."""
        del bounce
        return memoryview(self._get(begin, end))

    def fill_rows(self, begins: Int64, row_bytes: int, target: memoryview, *, blocks: tuple[int, int]) -> None:
        """Get equally long ranges one by one."""
        del blocks
        for row, begin in enumerate(begins.tolist()):
            target[row * row_bytes : (row + 1) * row_bytes] = self._get(begin, begin + row_bytes)

    def close(self) -> None:
        """Nothing is held open."""

    def _get(self, begin: int, end: int) -> bytes:
        try:
            data = self._store.read_range(self._name, begin, end)
        except FileNotFoundError:
            raise MissingFile(self._store.url(self._name)) from None
        if len(data) != end - begin:
            raise TruncatedFile(self._store.url(self._name), end, begin + len(data))
        self.read_bytes += len(data)
        return data
