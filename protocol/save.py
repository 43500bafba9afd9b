"""The rules of one save, without I/O: events in, actions out.

Participants are ranks; nothing here knows where they run. Invariant: :class:`Commit` is asked for at most once, and
only after every participant's image was reported durable with its planned size. Silence is failure.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from ckptd.protocol.errors import (
    BadPlan,
    CkptdError,
    RankMismatch,
    WriteIncomplete,
    for_rank,
)


class State(Enum):
    """Where a save is. COMMITTED and FAILED are final."""

    COLLECTING = "scheduled"
    WRITING = "staged"
    COMMITTING = "committing"
    COMMITTED = "committed"
    FAILED = "failed"


# --- events ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Proposed:
    """A rank sent its items and waits for its assignment."""

    rank: int
    checkpoint_id: str
    digest: str


@dataclass(frozen=True)
class RankSealed:
    """A rank's image is complete, staged under the plan with ``digest``."""

    rank: int
    checkpoint_id: str
    digest: str
    image_bytes: int


@dataclass(frozen=True)
class RankStages:
    """A rank stages its image in waves, under the plan with ``digest``: a first part of it is there."""

    rank: int
    checkpoint_id: str
    digest: str
    image_bytes: int


@dataclass(frozen=True)
class RankHandedOver:
    """A rank has staged all that it holds, with the planner and the writer that shall save it."""

    rank: int
    checkpoint_id: str


@dataclass(frozen=True)
class RankFell:
    """A rank will not stage its part: it gave up, died or fell silent."""

    rank: int
    error: CkptdError


@dataclass(frozen=True)
class Planned:
    """The plan is made; digest and image size of each rank."""

    digests: tuple[str, ...]
    image_bytes: tuple[int, ...]


@dataclass(frozen=True)
class ImageWritten:
    """A rank's image is durable."""

    rank: int
    bytes_written: int


@dataclass(frozen=True)
class Published:
    """The commit is done."""


@dataclass(frozen=True)
class Broke:
    """Planning, committing or a deadline failed the save as a whole, or a write failed for ``rank``."""

    error: CkptdError
    rank: int | None = None


Event = Proposed | RankStages | RankSealed | RankHandedOver | RankFell | Planned | ImageWritten | Published | Broke


# --- actions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MakePlan:
    """Plan over all ranks; those in ``fixed`` have already staged under the plan before."""

    fixed: frozenset[int]


@dataclass(frozen=True)
class Assign:
    """Tell a rank which of its items it stages."""

    rank: int


@dataclass(frozen=True)
class Write:
    """Make a rank's image durable."""

    rank: int


@dataclass(frozen=True)
class Commit:
    """Publish the checkpoint."""


@dataclass(frozen=True)
class AnnounceCommit:
    """Tell all ranks that the checkpoint is there."""


@dataclass(frozen=True)
class Abandon:
    """Remove what was written and tell all ranks why. ``replan``: cached layouts are not to be trusted."""

    error: CkptdError
    replan: bool


@dataclass(frozen=True)
class SaveHandedOver:
    """Have the planners and writers that the ranks have handed over do the save."""


Action = MakePlan | Assign | Write | Commit | SaveHandedOver | AnnounceCommit | Abandon


@dataclass
class SaveRules:
    """One save of a job of ``world_size`` ranks.

    Args:
        world_size: Number of participants, ranks ``0 .. world_size - 1``.
        known: Digest of each rank's items in the job's current plan; empty if there is none.
        known_bytes: Size of each rank's image in that plan, in bytes.
    """

    world_size: int
    known: tuple[str, ...] = ()
    known_bytes: tuple[int, ...] = ()
    state: State = State.COLLECTING
    error: CkptdError | None = None
    checkpoint_id: str = ""
    sealed: set[int] = field(default_factory=set)
    written: set[int] = field(default_factory=set)
    handed_over: set[int] = field(default_factory=set)
    _proposed: dict[int, str] = field(default_factory=dict)
    _planning: bool = False
    _planned: bool = False

    @property
    def decided(self) -> bool:
        """Whether the save has ended, either way."""
        return self.state in {State.COMMITTED, State.FAILED}

    def waiting_for(self) -> list[int]:
        """Return the ranks that have neither proposed nor sealed."""
        return sorted(set(range(self.world_size)) - self.sealed - set(self._proposed))

    def unsealed(self) -> list[int]:
        """Return the ranks whose part would be lost with them."""
        return sorted(set(range(self.world_size)) - self.sealed)

    def handle(self, event: Event) -> list[Action]:
        """Take one event and return what must now be done, in order."""
        if self.decided:
            return []  # late news about a save that is already decided
        match event:
            case Proposed():
                return self._agree(event.rank, event.checkpoint_id) or self._on_proposed(event)
            case RankStages():
                return self._agree(event.rank, event.checkpoint_id) or self._on_stages(event)
            case RankSealed():
                return self._agree(event.rank, event.checkpoint_id) or self._on_sealed(event)
            case RankHandedOver():
                return self._agree(event.rank, event.checkpoint_id) or self._on_handed_over(event)
            case RankFell():
                # A rank that has sealed may die: its bytes are ours now.
                return [] if event.rank in self.sealed else self._abandon(self._of_rank(event.rank, event.error))
            case Planned():
                return self._on_planned(event)
            case ImageWritten():
                return self._on_written(event)
            case Published():
                return self._on_published()
            case Broke():
                return self._abandon(event.error if event.rank is None else self._of_rank(event.rank, event.error))

    def _of_rank(self, rank: int, error: CkptdError) -> CkptdError:
        """Return an error with its rank named, where there is more than one."""
        return for_rank(rank, error) if self.world_size > 1 else error

    def _agree(self, rank: int, checkpoint_id: str) -> list[Action]:
        if not 0 <= rank < self.world_size:
            return self._abandon(RankMismatch(rank, f"rank {rank}", f"are {self.world_size} ranks"))
        self.checkpoint_id = self.checkpoint_id or checkpoint_id
        if checkpoint_id == self.checkpoint_id:
            return []
        return self._abandon(RankMismatch(rank, f"checkpoint id {checkpoint_id}", f"save {self.checkpoint_id}"))

    def _on_proposed(self, event: Proposed) -> list[Action]:
        if event.rank in self.sealed or event.rank in self._proposed:
            return []  # said already
        if self.handed_over:
            return self._disagree(event.rank)
        self._proposed[event.rank] = event.digest
        return self._plan_when_complete()

    def _on_stages(self, event: RankStages) -> list[Action]:
        return [] if event.rank in self.sealed else self._refuse_unplanned(event)

    def _on_sealed(self, event: RankSealed) -> list[Action]:
        if event.rank in self.sealed:
            return []  # the same seal, heard twice: by message and by the slot's control area
        refused = self._refuse_unplanned(event)
        if refused:
            return refused
        self.sealed.add(event.rank)
        self._proposed.pop(event.rank, None)
        if len(self.sealed) == self.world_size:
            self.state = State.WRITING
        return [Write(event.rank), *self._plan_when_complete()]

    def _refuse_unplanned(self, event: RankStages | RankSealed) -> list[Action]:
        """Abandon the save if what a rank stages is not what is planned."""
        if self.handed_over:
            return self._disagree(event.rank)
        outdated = event.rank in self._proposed and not self._planned  # it waits for a plan: this is not that plan
        if outdated or not self.known or self.known[event.rank] != event.digest:
            reason = f"rank {event.rank} staged under a plan that is no longer in force; save again"
            return self._abandon(BadPlan(event.checkpoint_id, reason))
        if event.image_bytes != self.known_bytes[event.rank]:
            planned = self.known_bytes[event.rank]
            return self._abandon(WriteIncomplete(event.rank, planned, event.image_bytes))
        return []

    def _on_handed_over(self, event: RankHandedOver) -> list[Action]:
        if event.rank in self.sealed:
            return []  # heard twice
        if self._proposed or self.sealed - self.handed_over:
            return self._abandon(RankMismatch(event.rank, "a planner or writer of its own", "use ckptd's"))
        self.known, self.known_bytes = (), ()
        self.sealed.add(event.rank)
        self.handed_over.add(event.rank)
        if len(self.sealed) < self.world_size:
            return []
        self.state = State.COMMITTING
        return [SaveHandedOver()]

    def _disagree(self, rank: int) -> list[Action]:
        return self._abandon(RankMismatch(rank, "a plan for ckptd's own writer", "handed over writers of their own"))

    def _plan_when_complete(self) -> list[Action]:
        if self._planning or not self._proposed or self.waiting_for():
            return []
        self._planning = True
        return [MakePlan(frozenset(self.sealed))]

    def _on_planned(self, event: Planned) -> list[Action]:
        if not self._planning or self._planned:
            return []  # nobody asked, or said already
        self._planned = True
        self.known, self.known_bytes = event.digests, event.image_bytes
        return [Assign(rank) for rank in sorted(self._proposed)]

    def _on_written(self, event: ImageWritten) -> list[Action]:
        if event.rank not in self.sealed or self.state is State.COMMITTING:
            return []  # of no image that we have, or said already
        planned = self.known_bytes[event.rank]
        if event.bytes_written != planned:
            return self._abandon(WriteIncomplete(event.rank, planned, event.bytes_written))
        self.written.add(event.rank)
        if len(self.written) < self.world_size:
            return []
        self.state = State.COMMITTING
        return [Commit()]

    def _on_published(self) -> list[Action]:
        if self.state is not State.COMMITTING:
            return []  # nobody asked
        self.state = State.COMMITTED
        return [AnnounceCommit()]

    def _abandon(self, error: CkptdError) -> list[Action]:
        self.state, self.error = State.FAILED, error
        return [Abandon(error, replan=isinstance(error, BadPlan | RankMismatch))]
