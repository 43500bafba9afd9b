"""The rules of a node's cache for loads, without I/O: who reads which range, who waits for whom, what is let go.

A checkpoint's files are looked at in cells of equal length; a frame of the shared segment holds one cell. The first
rank that claims a range reads it into the cell's frame, and with it whatever overlaps that others have said they want;
the others wait and copy. Invariants: a frame is given to another cell only when nobody can be reading or writing it;
every claim is answered; a rank that is slow or gone is waited for no longer than the limits say.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

# A load's requests end on multiples of this, so that each lies in one cell.
FRAME_BYTES: Final = 4 << 20

Range = tuple[int, int]
Cell = tuple[str, int]  # file, and number of the cell in it
Use = tuple[int, int]  # rank and claim


@dataclass(frozen=True)
class CacheLimits:
    """Sizes and waits of a cache.

    Attributes:
        frames: How many cells are held at a time.
        frame_bytes: Length of a cell.
        come_s: How long a rank that has not begun its load may still want everything, in seconds.
        full_s: How long a claim waits for a frame that a slower rank still wants, in seconds.
        read_s: How long a rank may take to read one range before another one is asked to, in seconds.
    """

    frames: int
    frame_bytes: int
    come_s: float = 1.0
    full_s: float = 2.0
    read_s: float = 5.0


# --- events --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Opened:
    """A rank takes part in a load; what it wants is still to be said."""

    rank: int


@dataclass(frozen=True)
class Wants:
    """A rank will claim these ranges of a file, each of them within one cell."""

    rank: int
    file: str
    ranges: tuple[Range, ...]


@dataclass(frozen=True)
class Begun:
    """All that a rank wants has been said."""

    rank: int


@dataclass(frozen=True)
class Skipped:
    """A rank has got a range in another way."""

    rank: int
    file: str
    range: Range


@dataclass(frozen=True)
class Claim:
    """A rank needs a range now. ``number`` is its own name for the claim, another one each time."""

    rank: int
    number: int
    file: str
    range: Range


@dataclass(frozen=True)
class Done:
    """A rank has done what it was answered, and touches the frame no more. ``good``: what it was to read is there."""

    rank: int
    number: int
    good: bool = True


@dataclass(frozen=True)
class Left:
    """A rank's load is over."""

    rank: int


@dataclass(frozen=True)
class Lost:
    """A rank's session has ended; its process may be stopped and come to life again."""

    rank: int


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


Event = Opened | Wants | Begun | Skipped | Claim | Done | Left | Lost | Tick

# --- actions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReadIt:
    """Tell a rank to read a range, which holds the claimed one, into a frame. Answer: Done."""

    rank: int
    number: int
    frame: int
    range: Range


@dataclass(frozen=True)
class Ready:
    """Tell a rank to copy its range from a frame. Answer: Done."""

    rank: int
    number: int
    frame: int
    nbytes: int


@dataclass(frozen=True)
class ReadAlone:
    """Tell a rank to read its range for itself."""

    rank: int
    number: int


@dataclass(frozen=True)
class Drop:
    """The load of all ranks is over: the segment can go."""


Action = ReadIt | Ready | ReadAlone | Drop


@dataclass(eq=False)
class _Span:
    """A range of a cell that is in its frame, or on its way there by ``reader``."""

    range: Range
    reader: Use | None
    since_s: float


@dataclass(eq=False)
class _Held:
    """A cell in a frame. ``uses``: who may still read or write there."""

    frame: int
    spans: list[_Span] = field(default_factory=list)
    uses: set[Use] = field(default_factory=set)

    def covering(self, wanted: Range) -> _Span | None:
        """Return the span that holds a range; one that is ready if there is one."""
        found = [span for span in self.spans if span.range[0] <= wanted[0] and wanted[1] <= span.range[1]]
        return min(found, key=lambda span: span.reader is not None, default=None)


@dataclass(frozen=True)
class _Waiting:
    claim: Claim
    since_s: float


class CacheRules:
    """The cache of one job on one node.

    Args:
        world_size: How many ranks may load.
        limits: Sizes and waits.
    """

    def __init__(self, world_size: int, limits: CacheLimits) -> None:
        self.world_size, self.limits = world_size, limits
        self._lost: set[int] = set()
        self._reset()

    def _reset(self) -> None:
        self._free = list(range(self.limits.frames))
        self._held: dict[Cell, _Held] = {}  # least recently used first
        self._uses: dict[Use, tuple[Cell, _Held]] = {}
        self._wants: dict[int, dict[Cell, list[Range]]] = {}  # of ranks that are loading
        self._begun: set[int] = set()
        self._left: set[int] = set()
        self._late: set[int] = set()  # ranks that frames are kept for no longer
        self._waiting: list[_Waiting] = []
        self._begun_s: float | None = None
        self._heard_s = 0.0

    @property
    def is_waited_for(self) -> bool:
        """Whether there are claims that time may answer."""
        return bool(self._waiting)

    def handle(self, event: Event, now_s: float) -> list[Action]:
        """Take an event and return what must now be done, in order. ``now_s`` only ever grows."""
        if isinstance(event, Opened | Claim):
            self._begun_s = now_s if self._begun_s is None else self._begun_s
            self._heard_s = now_s
        if isinstance(event, Claim) and event.rank not in self._wants:  # it has left, or is lost
            return [] if event.rank in self._lost else [ReadAlone(event.rank, event.number)]
        self._note(event, now_s)
        actions = list(self._answer_waiting(now_s))
        if self._is_over(now_s):
            self._reset()
            actions.append(Drop())
        return actions

    def _note(self, event: Event, now_s: float) -> None:
        match event:
            case Opened(rank) if rank not in self._lost:
                self._left.discard(rank)
                self._wants.setdefault(rank, {})
            case Wants(rank, file, ranges) if rank in self._wants:
                self._want(rank, file, ranges)
            case Begun(rank) if rank in self._wants:
                self._begun.add(rank)
            case Skipped(rank, file, wanted):
                self._want_no_more(rank, self._cell(file, wanted), wanted)
            case Claim():
                self._waiting.append(_Waiting(event, now_s))
            case Done(rank, number, good):
                self._end_use((rank, number), good=good)
            case Left(rank):
                self._leave(rank)
                self._left.add(rank)
            case Lost(rank):
                self._leave(rank)
                self._lost.add(rank)
            case Tick():
                self._give_up_on_slow_readers(now_s)

    # --- what events change ------------------------------------------------------------------------------------------

    def _cell(self, file: str, wanted: Range) -> Cell:
        return file, wanted[0] // self.limits.frame_bytes

    def _want(self, rank: int, file: str, ranges: tuple[Range, ...]) -> None:
        for wanted in ranges:
            self._wants[rank].setdefault(self._cell(file, wanted), []).append(wanted)

    def _want_no_more(self, rank: int, cell: Cell, wanted: Range) -> None:
        ranges = self._wants.get(rank, {}).get(cell, [])
        # What is claimed may be a little shorter than what was announced: a request that begins in a gap.
        announced = next((other for other in ranges if other[0] <= wanted[0] and wanted[1] <= other[1]), None)
        if announced is not None:
            ranges.remove(announced)
            if not ranges:
                del self._wants[rank][cell]

    def _end_use(self, use: Use, *, good: bool) -> None:
        if use not in self._uses:
            return
        cell, held = self._uses.pop(use)
        held.uses.discard(use)
        for span in [span for span in held.spans if span.reader == use]:
            if good:
                span.reader = None
            else:
                held.spans.remove(span)
        if not held.spans and not held.uses:
            del self._held[cell]
            self._free.append(held.frame)

    def _leave(self, rank: int) -> None:
        """A rank claims no more. Its uses of frames stay: only it can say that it has let them go."""
        self._wants.pop(rank, None)
        self._begun.discard(rank)
        self._waiting = [waiting for waiting in self._waiting if waiting.claim.rank != rank]
        for held in self._held.values():
            held.spans = [span for span in held.spans if span.reader is None or span.reader[0] != rank]

    def _give_up_on_slow_readers(self, now_s: float) -> None:
        for held in self._held.values():
            held.spans = [
                span for span in held.spans if span.reader is None or now_s - span.since_s < self.limits.read_s
            ]

    def _is_over(self, now_s: float) -> bool:
        """Whether nobody loads, and nobody is expected to."""
        if self._begun_s is None or self._wants or self._waiting:
            return False
        all_done = len(self._left | self._lost) >= self.world_size
        return all_done or now_s - self._heard_s > self.limits.come_s

    # --- answers -----------------------------------------------------------------------------------------------------

    def _answer_waiting(self, now_s: float) -> Iterator[Action]:
        """Answer all claims that can be, in the order they came."""
        answered = True
        while answered:  # one answer may make room for another claim
            answered, full = False, False
            for waiting in list(self._waiting):
                answer = self._answer(waiting, now_s, full=full)
                if isinstance(answer, bool):
                    full = full or answer
                else:
                    answered = True
                    self._waiting.remove(waiting)
                    yield answer

    def _answer(self, waiting: _Waiting, now_s: float, *, full: bool) -> Action | bool:
        """Return the answer to a claim; none yet: whether that is because all frames are in use."""
        claim, cell = waiting.claim, self._cell(waiting.claim.file, waiting.claim.range)
        use = (claim.rank, claim.number)
        held = self._held.get(cell)
        span = held.covering(claim.range) if held is not None else None
        if span is not None and span.reader is not None:
            return False
        if held is None:
            patient = now_s - waiting.since_s < self.limits.full_s
            shared = self._is_shared(claim, cell, now_s)
            frame = self._find_frame(now_s, by_force=not patient) if shared and not (full and patient) else None
            if frame is None and shared and patient:
                return True
            if frame is None:
                self._want_no_more(claim.rank, cell, claim.range)
                return ReadAlone(*use)
            held = _Held(frame)
        hull = self._hull(cell, claim.range)
        self._want_no_more(claim.rank, cell, claim.range)
        self._held.pop(cell, None)
        self._held[cell] = held  # the most recently used one
        held.uses.add(use)
        self._uses[use] = (cell, held)
        if span is not None:
            return Ready(*use, held.frame, claim.range[1] - claim.range[0])
        held.spans.append(_Span(hull, use, now_s))
        return ReadIt(*use, held.frame, hull)

    def _is_shared(self, claim: Claim, cell: Cell, now_s: float) -> bool:
        """Whether another rank wants some of it, or may turn out to."""
        if self._missing_ranks(now_s):
            return True
        begin, end = claim.range
        return any(
            first < end and begin < last
            for rank, cells in self._wants.items()
            if rank != claim.rank
            for first, last in cells.get(cell, ())
        )

    def _missing_ranks(self, now_s: float) -> bool:
        """Whether there are ranks that have not begun, and may still do so."""
        if self._begun_s is None or now_s - self._begun_s > self.limits.come_s:
            return False
        return len(self._begun | self._left | self._lost) < self.world_size

    def _hull(self, cell: Cell, wanted: Range) -> Range:
        """Return a range and what overlaps with it, and so on, of all that is wanted of a cell."""
        ranges = [other for cells in self._wants.values() for other in cells.get(cell, ())]
        begin, end = wanted
        for first, last in sorted(ranges):  # by their beginnings: one pass finds all that reach on to the right
            if first < end and begin < last:
                begin, end = min(begin, first), max(end, last)
        for first, last in sorted(ranges, key=lambda other: -other[1]):
            if first < end and begin < last:
                begin, end = min(begin, first), max(end, last)
        return begin, end

    def _find_frame(self, now_s: float, *, by_force: bool) -> int | None:
        """Return a frame that nobody uses and, unless it is taken by force, nobody wants any more."""
        if self._free:
            return self._free.pop()
        idle = [cell for cell, held in self._held.items() if not held.uses]
        victim = None
        if not self._missing_ranks(now_s):
            victim = next((cell for cell in idle if not self._wanting(cell)), None)
        if victim is None and idle and by_force:
            victim = idle[0]
            self._late.update(self._wanting(victim))
        return None if victim is None else self._held.pop(victim).frame

    def _wanting(self, cell: Cell) -> list[int]:
        return [rank for rank, cells in self._wants.items() if rank not in self._late and cell in cells]
