"""What the daemon knows of one connected rank: who it is, its token, its arenas.

Invariant: a session's token opens the slots of this session's arenas and no others.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import select
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from ckptd.daemon.workers.supervisor import Identity
from ckptd.protocol import messages
from ckptd.protocol.errors import BadMessage
from ckptd.protocol.messages import Sealed
from ckptd.protocol.wave_messages import WaveSealed
from ckptd.protocol.waves import part_of
from ckptd.staging.arena import ALIGNMENT_BYTES, SlotState, is_held, read_seal, read_slot, write_slot_state

TOKEN_BYTES: Final = 32


@dataclass(frozen=True)
class Peer:
    """Who is at the other end of a Unix socket, as the kernel says."""

    pid: int
    uid: int
    gid: int
    started_ticks: int = 0  # since boot; tells it from a later process of its pid. 0: unknown

    def has_ended(self) -> bool:
        """Return whether the process is gone; one that its parent has not waited for is."""
        if self.started_ticks and started_ticks(self.pid) not in {self.started_ticks, 0}:
            return True  # the pid is another's by now
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return True
        except OSError:
            return False  # in a pid namespace that is not ours: nobody can tell
        try:
            ended = select.poll()  # select(2) takes no descriptor above 1023
            ended.register(descriptor, select.POLLIN)
            return bool(ended.poll(0))
        finally:
            os.close(descriptor)


def started_ticks(pid: int) -> int:
    """Return when a process started, in clock ticks since boot, or 0 where nobody can tell."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            # The second field, the command's name in parentheses, may hold blanks. Source: proc_pid_stat(5).
            return int(stat.read().rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


@dataclass(frozen=True)
class ArenaFile:
    """An arena, seen from the daemon, which never maps it."""

    number: int
    path: str
    descriptor: int
    slots: int
    slot_bytes: int

    def states(self) -> Iterator[tuple[SlotState, int]]:
        """Yield state and sequence of each slot."""
        for slot in range(self.slots):
            state, _, sequence = read_slot(self.descriptor, slot)
            yield state, sequence

    def set_state(self, slot: int, state: SlotState, sequence: int = 0) -> None:
        """Set the state of a slot."""
        write_slot_state(self.descriptor, slot, state, sequence)


@dataclass(eq=False)
class Session:
    """One rank of one incarnation of a job."""

    peer: Peer
    identity: Identity | None
    rank: int
    incarnation: int
    token: bytes = field(default_factory=lambda: secrets.token_bytes(TOKEN_BYTES))
    address: bytes = b""  # ZeroMQ routing id of its last message
    arenas: dict[int, ArenaFile] = field(default_factory=dict)
    heard_at_s: float = field(default_factory=time.monotonic)
    live: bool = True
    attached: bool = True  # whether it has a connection now
    attachment: int = 0  # which of its attach connections counts; a client that lost one comes back by another

    @property
    def client_has_ended(self) -> bool:
        """Whether the client is gone, as the kernel tells: for a session that has no connection."""
        if self.peer.has_ended():
            return True
        arenas = self.arenas.values()
        return bool(arenas) and not any(is_held(arena.descriptor) for arena in arenas)

    @property
    def silent_s(self) -> float:
        """Seconds since the last message."""
        return time.monotonic() - self.heard_at_s

    def check(self, seal: Sealed | WaveSealed) -> ArenaFile:
        """Return the arena that a seal names. Raises BadMessage if it is not this session's, or does not fit."""
        arena = self.arenas.get(seal.arena)
        if arena is None or not 0 <= seal.slot < arena.slots:
            raise BadMessage(f"slot {seal.slot} of arena {seal.arena}, which this session does not have")
        begin, nbytes = part_of(seal)
        aligned = all(number % ALIGNMENT_BYTES == 0 for number in (seal.control_bytes, begin, nbytes, seal.image_bytes))
        if not aligned or seal.control_bytes + nbytes > arena.slot_bytes or begin + nbytes > seal.image_bytes:
            raise BadMessage(f"an image of {seal.image_bytes} bytes in a slot of {arena.slot_bytes}")
        if isinstance(seal, Sealed) and seal.code_offset + seal.code_bytes > seal.image_bytes:
            raise BadMessage(f"a hand-over of {seal.code_bytes} bytes behind the end of its image")
        return arena

    def seals_left_behind(self) -> Iterator[Sealed | WaveSealed]:
        """Yield the seals that stand in the arenas: a trainer may die between sealing a slot and saying so."""
        for arena in self.arenas.values():
            for slot in range(arena.slots):
                data = read_seal(arena.descriptor, slot, arena.slot_bytes)
                if data is None:
                    continue
                try:
                    seal = messages.decode_client_message(data)
                except BadMessage:
                    continue  # half-written or forged: nothing was sealed
                if isinstance(seal, Sealed | WaveSealed) and (seal.arena, seal.slot) == (arena.number, slot):
                    yield seal

    def status(self) -> dict[str, object]:
        """Return what `/status` tells of the session."""
        arenas = list(self.arenas.values())
        return {
            "rank": self.rank,
            "pid": self.peer.pid,
            "slots": [
                {"state": state.name.lower(), "sequence": sequence}
                for arena in arenas
                for state, sequence in arena.states()
            ],
            "slot_bytes": max((arena.slot_bytes for arena in arenas), default=0),
            "silent_s": self.silent_s,
        }

    def close_arena(self, number: int) -> None:
        """Give up an arena: its pages go when the last process that maps it goes."""
        arena = self.arenas.pop(number, None)
        if arena is not None:
            os.close(arena.descriptor)
            with contextlib.suppress(FileNotFoundError):  # its client removed it, for want of a daemon
                os.unlink(arena.path)


def identity_of(peer: Peer) -> Identity | None:
    """Return whom a peer's workers run as; None where that is ourselves."""
    if os.geteuid() != 0 or peer.uid == 0:
        return None
    try:
        name = pwd.getpwuid(peer.uid).pw_name
        groups = os.getgrouplist(name, peer.gid)
    except KeyError:
        groups = [peer.gid]  # a uid without a name, as in many containers
    return Identity(peer.uid, peer.gid, tuple(groups))
