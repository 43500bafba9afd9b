"""The rules of who takes part in a job, without I/O.

Invariant: at most one live session holds a rank, and all live sessions of a job are of one incarnation.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ckptd.protocol.errors import RankMismatch, RankTaken


@dataclass
class Seat:
    """One rank's place in an incarnation."""

    pid: int
    live: bool = True


@dataclass
class Roster:
    """The ranks of one job, over its incarnations.

    A new incarnation begins when a rank comes back whose session has ended, when the launcher says that this is
    another start, or when nobody is left. All older sessions are fenced by it.
    """

    job: str
    world_size: int = 0
    incarnation: int = 0
    launch: str = ""
    seats: dict[int, Seat] = field(default_factory=dict)

    def live_ranks(self) -> list[int]:
        """Return the ranks with a live session."""
        return sorted(rank for rank, seat in self.seats.items() if seat.live)

    def join(self, rank: int, *, world_size: int, launch: str, pid: int) -> list[int]:
        """Seat a rank and return the ranks whose older sessions are fenced by that.

        Args:
            rank: The rank that joins.
            world_size: How many ranks the job has.
            launch: The launcher's name for this start of the job, or "".
            pid: The process, as the kernel told us.

        Raises:
            RankTaken: A live session of this incarnation holds the rank.
            RankMismatch: The rank is outside the world, or the job has another world size.
        """
        if rank >= world_size:
            raise RankMismatch(rank, f"rank {rank} of {world_size}", "count from 0")
        live = self.live_ranks()
        relaunched = bool(launch and self.launch and launch != self.launch)
        seat = self.seats.get(rank)
        if not live or relaunched or (seat is not None and not seat.live):
            self.incarnation += 1
            self.world_size, self.launch = world_size, launch
            self.seats = {rank: Seat(pid)}
            return [other for other in live if other != rank or relaunched]
        if world_size != self.world_size:
            raise RankMismatch(rank, f"world size {world_size}", f"have world size {self.world_size}")
        if seat is not None:
            raise RankTaken(self.job, rank, seat.pid)
        self.seats[rank] = Seat(pid)
        return []

    def leave(self, rank: int, *, incarnation: int) -> None:
        """Note that a session ended; news from an older incarnation is dropped."""
        if incarnation == self.incarnation and rank in self.seats:
            self.seats[rank].live = False
