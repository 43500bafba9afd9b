"""What the daemon knows of one connected rank: who it is, its token, its arenas.

Invariant: a session's token opens the slots of this session's arenas and no others.
"""

from __future__ import annotations

import os
import secrets
import select
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from ckptd.daemon.supervisor import Identity
from ckptd.protocol import messages
from ckptd.protocol.errors import BadMessage
from ckptd.protocol.messages import Sealed
from ckptd.staging.arena import ALIGNMENT_BYTES, SlotState, read_seal, read_slot, write_slot_state

TOKEN_BYTES: Final = 32


@dataclass(frozen=True)
class Peer:
    """Who is at the other end of a Unix socket, as the kernel says."""

    pid: int
    uid: int
    gid: int

    def has_ended(self) -> bool:
        """Return whether the process is gone; one that its parent has not waited for is."""
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

    @property
    def silent_s(self) -> float:
        """Seconds since the last message."""
        return time.monotonic() - self.heard_at_s

    def check(self, seal: Sealed) -> ArenaFile:
        """Return the arena that a seal names. Raises BadMessage if it is not this session's, or does not fit."""
        arena = self.arenas.get(seal.arena)
        if arena is None or not 0 <= seal.slot < arena.slots:
            raise BadMessage(f"slot {seal.slot} of arena {seal.arena}, which this session does not have")
        aligned = seal.control_bytes % ALIGNMENT_BYTES == 0 and seal.image_bytes % ALIGNMENT_BYTES == 0
        if not aligned or seal.control_bytes + seal.image_bytes > arena.slot_bytes:
            raise BadMessage(f"an image of {seal.image_bytes} bytes in a slot of {arena.slot_bytes}")
        if seal.code_offset + seal.code_bytes > seal.image_bytes:
            raise BadMessage(f"a hand-over of {seal.code_bytes} bytes behind the end of its image")
        return arena

    def seals_left_behind(self) -> Iterator[Sealed]:
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
                if isinstance(seal, Sealed) and (seal.arena, seal.slot) == (arena.number, slot):
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
            os.unlink(arena.path)
