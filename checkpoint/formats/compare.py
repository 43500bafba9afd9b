"""What differs between two checkpoints of any format: names, shapes and types, values. Knows no torch.

Values are compared by hash where both sides have hashes of the same boxes, which reads nothing; by bytes otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from ckptd.checkpoint.formats.numbers import distance
from ckptd.checkpoint.formats.objects import same_objects
from ckptd.checkpoint.formats.plain import plain_value
from ckptd.checkpoint.formats.source import Entry, Source
from ckptd.checkpoint.formats.whole import whole

# Values of objects are shown up to this many characters.
_SHOWN_CHARACTERS: Final = 80


class Kind(StrEnum):
    """How a name differs."""

    ONLY_LEFT = "only_left"
    ONLY_RIGHT = "only_right"
    TYPE = "type"
    VALUE = "value"


@dataclass(frozen=True)
class Difference:
    """One name that differs.

    Attributes:
        name: The name.
        kind: How.
        left: Shape and dtype on the left, or what differs there; "" where it is not.
        right: The same on the right.
        elements: How many elements differ, for values of tensors.
        largest: Largest absolute difference of two elements, for values of tensors that are numbers.
    """

    name: str
    kind: Kind
    left: str = ""
    right: str = ""
    elements: int | None = None
    largest: float | None = None


def describe(entry: Entry) -> str:
    """Return an entry's dtype and shape, as in ``float32[4, 6]``."""
    return "object" if entry.is_object else f"{entry.kind}{list(entry.shape)}"


def compare(
    left: Source, right: Source, *, values: bool = True, done: Callable[[int], None] = lambda _: None
) -> Iterator[Difference]:
    """Yield what differs, by name: those of the left in its order, then those that only the right has.

    Args:
        left: One checkpoint.
        right: The other.
        values: Compare values, not only names, shapes and dtypes.
        done: Called with bytes of a tensor that has been dealt with.

    Raises:
        StorageError: Bytes are missing or wrong.
    """
    theirs = {entry.name: entry for entry in right.entries}
    for ours in left.entries:
        other = theirs.pop(ours.name, None)
        if other is None:
            yield Difference(ours.name, Kind.ONLY_LEFT, left=describe(ours))
        elif (ours.dtype, ours.shape) != (other.dtype, other.shape):
            yield Difference(ours.name, Kind.TYPE, describe(ours), describe(other))
        elif values:
            yield from _compare_values(left, right, ours, other)
        done(ours.nbytes)
    for other in theirs.values():
        yield Difference(other.name, Kind.ONLY_RIGHT, right=describe(other))


def _compare_values(left: Source, right: Source, ours: Entry, theirs: Entry) -> Iterator[Difference]:
    if _same_hashes(ours, theirs):
        return
    if ours.is_object:
        one, other = left.object_bytes(ours), right.object_bytes(theirs)
        if not same_objects(one, other):
            yield Difference(ours.name, Kind.VALUE, _shown(one), _shown(other))
        return
    found = distance(ours, whole(left, ours), whole(right, theirs))
    if found.elements:
        yield Difference(ours.name, Kind.VALUE, describe(ours), describe(theirs), found.elements, found.largest)


def _shown(data: bytes) -> str:
    known, value = plain_value(data)
    return repr(value)[:_SHOWN_CHARACTERS] if known else "object"


def _same_hashes(ours: Entry, theirs: Entry) -> bool:
    """Return whether the hashes prove that two entries are the same."""
    one, other = (
        {(box.offsets, box.sizes): box.xxh3_64 for box in entry.boxes if box.elements} for entry in (ours, theirs)
    )
    return None not in one.values() and one == other
