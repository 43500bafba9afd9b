"""What every format offers to the tools: named tensors and objects, read piece by piece. Knows no torch.

A tensor is one or more boxes (its chunks); a box's payload is its values in C order, however the file holds them.
Invariant: a reader holds a few MiB at a time, whatever the size of the tensor.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

import xxhash

from ckptd.checkpoint.indexing.columns import KeyPath
from ckptd.protocol.errors import MissingKeys, WrongBits
from ckptd.staging.dtypes import OBJECT, by_code

# One read. Larger ones are not faster, and this is what a tool holds of a tensor at a time.
PIECE_BYTES: Final = 8 << 20


@dataclass(frozen=True)
class Box:
    """A part of a tensor: where it begins and how far it reaches, in elements.

    Attributes:
        offsets: First index along each dimension of the tensor.
        sizes: Extent along each dimension.
        item: What the format calls it; a row of an index, say.
        xxh3_64: Hash of its payload, or None where the file has none.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    item: int = 0
    xxh3_64: int | None = None

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)


@dataclass(frozen=True)
class Entry:
    """One name of a checkpoint.

    Attributes:
        name: Its fully qualified name.
        path: Where it stands in the nested state dict.
        dtype: Code of :mod:`ckptd.staging.dtypes`; ``OBJECT`` for what is no tensor.
        shape: In elements; empty for objects.
        requires_grad: As saved.
        boxes: Its chunks; an object has one.
    """

    name: str
    path: KeyPath
    dtype: int
    shape: tuple[int, ...]
    requires_grad: bool
    boxes: tuple[Box, ...]

    @property
    def is_object(self) -> bool:
        """Whether this is no tensor."""
        return self.dtype == OBJECT

    @property
    def itemsize_bytes(self) -> int:
        """Bytes of one element; 1 for an object."""
        return 1 if self.is_object else by_code(self.dtype).itemsize_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of all values; 0 for an object."""
        return 0 if self.is_object else math.prod(self.shape) * self.itemsize_bytes

    @property
    def kind(self) -> str:
        """The dtype's name, or "object"."""
        return "object" if self.is_object else by_code(self.dtype).name


class Source(ABC):
    """A checkpoint, or a file of another format, open for reading. A context manager.

    Attributes:
        path: What was opened.
        entries: All names, in the order of the file.
    """

    path: str
    entries: Sequence[Entry]

    @abstractmethod
    def fill(self, entry: Entry, box: Box, begin: int, target: memoryview) -> None:
        """Read payload bytes ``[begin, begin + len(target))`` of a tensor's box into ``target``.

        Raises:
            StorageError: They are not there, or the file is not what it should be.
        """

    @abstractmethod
    def object_bytes(self, entry: Entry) -> bytes:
        """Return an object in its ``torch.save`` form; raises StorageError as :meth:`fill` does."""

    @abstractmethod
    def object_value(self, entry: Entry, *, trust: bool) -> object:
        """Return an object. Needs torch for all but plain values.

        Args:
            entry: Its entry.
            trust: Run the pickle in it, whatever classes it names; otherwise only what ``weights_only`` allows.

        Raises:
            BadFile: It cannot be unpickled, or not without trust.
        """

    def close(self) -> None:  # noqa: B027  # a source without files has nothing to close
        """Close the files."""

    def place(self, entry: Entry, box: Box) -> str:
        """Return which file holds a box, for messages."""
        del entry, box
        return self.path

    def position(self, box: Box) -> int:
        """Return by what the boxes of one file are read in order."""
        return box.item

    def entry(self, name: str) -> Entry:
        """Return the entry of a name. Raises MissingKeys."""
        found = next((entry for entry in self.entries if entry.name == name), None)
        if found is None:
            raise MissingKeys(self.path, 1, name)
        return found

    def pieces(self, entry: Entry, box: Box, cuts: Iterable[int] | None = None) -> Iterator[memoryview]:
        """Yield a box's payload piece by piece; each piece is gone when the next is asked for.

        Args:
            entry: A tensor.
            box: One of its boxes.
            cuts: Length of each piece in bytes; at most some MiB each by default.

        Raises:
            WrongBits: The payload does not match its hash. Raised after the last piece, so what was made of the
                pieces is to be thrown away.
            StorageError: A read failed.
        """
        nbytes = box.elements * entry.itemsize_bytes
        digest = None if box.xxh3_64 is None else xxhash.xxh3_64()
        buffer, begin = memoryview(bytearray(min(nbytes, PIECE_BYTES))), 0
        for length in _even(nbytes) if cuts is None else cuts:
            if length > len(buffer):
                buffer = memoryview(bytearray(length))
            piece = buffer[:length]
            self.fill(entry, box, begin, piece)
            if digest is not None:
                digest.update(piece)
            yield piece
            begin += length
        if digest is not None and digest.intdigest() != box.xxh3_64:
            raise WrongBits(self.place(entry, box), entry.name, self.position(box))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _even(nbytes: int) -> Iterator[int]:
    for begin in range(0, nbytes, PIECE_BYTES):
        yield min(PIECE_BYTES, nbytes - begin)


class Subset(Source):
    """Some entries of another source, which stays the owner of the files."""

    def __init__(self, source: Source, entries: Sequence[Entry]) -> None:
        self._source = source
        self.path, self.entries = source.path, entries

    def fill(self, entry: Entry, box: Box, begin: int, target: memoryview) -> None:
        """As the source does."""
        self._source.fill(entry, box, begin, target)

    def object_bytes(self, entry: Entry) -> bytes:
        """As the source does."""
        return self._source.object_bytes(entry)

    def object_value(self, entry: Entry, *, trust: bool) -> object:
        """As the source does."""
        return self._source.object_value(entry, trust=trust)

    def place(self, entry: Entry, box: Box) -> str:
        """As the source does."""
        return self._source.place(entry, box)

    def position(self, box: Box) -> int:
        """As the source does."""
        return self._source.position(box)
