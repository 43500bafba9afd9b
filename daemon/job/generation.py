"""One save in flight: the rules, what each rank sent, and what the status tells of it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Final

from ckptd.checkpoint.folder.user_data import USER_DATA
from ckptd.checkpoint.names import hidden_directory
from ckptd.daemon.monitoring.timeline import Timeline
from ckptd.daemon.session.sessions import ArenaFile
from ckptd.protocol.errors import SystemCallFailed
from ckptd.protocol.messages import PlanRanks, Propose, Sealed, WriteDone, decode_plan_ranks
from ckptd.protocol.retention_messages import Keep
from ckptd.protocol.save import SaveRules, State
from ckptd.protocol.waves import Wave, WaveRing

RANKS_SUFFIX: Final = ".ranks"


@dataclass(eq=False)
class CurrentPlan:
    """A plan in force: its file, and what it means for each rank.

    Attributes:
        path: Its file, which workers read.
        digests: By which each rank knows its part.
        image_bytes: Size of each rank's image in bytes.
        made_for: Incarnation and sequence of the generation that it was made for.
        committed: Whether a generation staged under it was committed: only then is it kept for the next ones.
    """

    path: str
    digests: tuple[str, ...]
    image_bytes: tuple[int, ...]
    made_for: tuple[int, int]
    committed: bool = False
    _ranks: PlanRanks | None = None

    def ranks(self) -> PlanRanks:
        """Return each rank's local plan and assignment, so that a changed rank can be planned anew.

        Raises:
            SystemCallFailed: The file beside the plan cannot be read. The save fails; the next one plans anew.
        """
        if self._ranks is None:
            path = self.path + RANKS_SUFFIX
            try:
                with open(path, "rb") as file:
                    self._ranks = decode_plan_ranks(file.read())
            except OSError as error:
                raise SystemCallFailed("read", path, error.errno or 0) from None
        return self._ranks


@dataclass(eq=False)
class RankWaves:
    """A rank's image that comes in waves: what of it is where, and what its writing took so far."""

    ring: WaveRing
    arena: ArenaFile
    left: list[tuple[Wave, bool]] = field(default_factory=list)  # by a daemon before us, and whether they are written
    write_s: float = 0.0
    direct: bool = True
    all_written: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True)
class Seal:
    """A rank's sealed slot, and where it lies."""

    message: Sealed
    arena: ArenaFile


@dataclass(eq=False)
class Generation:
    """One save of one incarnation of a job."""

    incarnation: int
    sequence: int
    save_id: str
    rules: SaveRules
    plan: CurrentPlan | None
    older_plans: list[CurrentPlan] = field(default_factory=list)  # under which ranks have staged before another one did
    dry: bool = False  # only a plan is wanted, ahead of the first save
    metadata: bytes = b""  # of a hand-over, as its worker pickled it
    proposals: dict[int, Propose] = field(default_factory=dict)
    seals: dict[int, Seal] = field(default_factory=dict)
    waves: dict[int, RankWaves] = field(default_factory=dict)  # of ranks that stage in waves
    written: dict[int, WriteDone] = field(default_factory=dict)
    bytes_done: dict[int, int] = field(default_factory=dict)
    begun_at_s: float = field(default_factory=time.monotonic)
    begun_unix_s: float = field(default_factory=time.time)
    news_at_s: float = field(default_factory=time.monotonic)
    ended_at_s: float | None = None
    timeline: Timeline = field(default_factory=Timeline)
    work: set[asyncio.Task[None]] = field(default_factory=set)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def plans(self) -> list[CurrentPlan]:
        """The plans that its images are staged under; their files are needed until it has ended."""
        return [*self.older_plans, *([] if self.plan is None else [self.plan])]

    @property
    def directory(self) -> str:
        """Hidden directory of the files, until they are published."""
        return hidden_directory(self.rules.checkpoint_id, self.save_id)

    @property
    def bytes_total(self) -> int:
        """Bytes of all images, or of those sealed so far while there is no plan."""
        return sum(self.rules.known_bytes) or sum(seal.message.image_bytes for seal in self.seals.values())

    @property
    def keep(self) -> Keep | None:
        """What of its folder is to be kept once it is committed, as rank 0 said; None: everything."""
        seal = self.seals.get(0)
        return None if seal is None else seal.message.keep

    def user_header(self) -> dict[str, str]:
        """Return the entry of the index's header that holds what rank 0's user says of the checkpoint, if anything."""
        seal = self.seals.get(0)
        return {USER_DATA: seal.message.user} if seal is not None and seal.message.user else {}

    @property
    def seconds(self) -> float:
        """Age of the save, or how long it took."""
        return (self.ended_at_s or time.monotonic()) - self.begun_at_s

    def forget_work(self) -> None:
        """The save is committed: only where its image lies is still of interest."""
        self.written.clear()
        self.proposals.clear()
        self.metadata = b""

    def note_news(self) -> None:
        """Something happened: the deadline begins anew."""
        self.news_at_s = time.monotonic()

    def waiting_for(self) -> str:
        """Return in words what this save waits for."""
        ranks = self.rules.waiting_for() or self.rules.unsealed()
        if ranks:
            named = ", ".join(str(rank) for rank in ranks[:8]) + (", ..." if len(ranks) > 8 else "")
            return f"save of {self.rules.checkpoint_id} waits for rank {named} to stage its part"
        return f"save of {self.rules.checkpoint_id} waits for its files to be written"

    def status(self) -> dict[str, object]:
        """Return what `/status` tells."""
        slowest = self.timeline.slowest()
        return {
            "sequence": self.sequence,
            "save_id": self.save_id,
            "checkpoint_id": self.rules.checkpoint_id,
            "state": self.rules.state.value,
            "bytes_done": sum(self.bytes_done.values()),
            "bytes_total": self.bytes_total,
            "started_unix_s": self.begun_unix_s,
            "seconds": self.seconds,
            "ranks_sealed": len(self.rules.sealed),
            "ranks_written": len(self.rules.written),
            "world_size": self.rules.world_size,
            "incarnation": self.incarnation,
            "phases": self.timeline.status(),
            "bytes_per_s": self.timeline.rate(sum(self.bytes_done.values()), running=self.ended_at_s is None),
            "slowest_rank": None if slowest is None else {"rank": slowest[0], "lag_s": slowest[1]},
            "waiting_for": self.waiting_for() if self.rules.state is State.COLLECTING else None,
            "error": None if self.rules.error is None else str(self.rules.error),
            "error_code": None if self.rules.error is None else self.rules.error.code,
        }
