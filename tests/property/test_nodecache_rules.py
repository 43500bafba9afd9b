"""Whatever order ranks claim, read, copy, stall and die in: no wrong byte, no claim without an answer."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.protocol.cache import (
    Begun,
    CacheLimits,
    CacheRules,
    Claim,
    Done,
    Drop,
    Left,
    Lost,
    Opened,
    ReadAlone,
    ReadIt,
    Ready,
    Skipped,
    Tick,
    Wants,
)

FRAME = 8
FILES = {name: random.Random(name).randbytes(5 * FRAME) for name in ("f", "g")}
LIMITS = CacheLimits(frames=3, frame_bytes=FRAME, come_s=1.0, full_s=2.0, read_s=5.0)


class Node:
    """Ranks that load through a segment of bytes. Every step is one event; copies and reads take two."""

    def __init__(self, world):
        self.rules, self.now_s = CacheRules(len(world), LIMITS), 0.0
        self.segment = bytearray(LIMITS.frames * FRAME)
        self.todo = dict(enumerate(world))  # what each rank still has to claim
        self.claims, self.number = {}, 0  # unanswered: (rank, number) -> file, range
        self.reading, self.copying = {}, {}
        self.got = {rank: [] for rank in self.todo}
        self.read = []  # (file, byte) for each byte that came from the disk
        self.dead, self.left = set(), set()

    def hear(self, event):
        for action in self.rules.handle(event, self.now_s):
            if isinstance(action, Drop):
                assert not self.claims
                assert not any(rank not in self.dead for rank, _ in [*self.reading, *self.copying])
                self.segment[:] = bytes(len(self.segment))
                continue
            use = (action.rank, action.number)
            file, wanted = self.claims.pop(use)  # answered once, and while it lives
            assert action.rank not in self.dead
            match action:
                case ReadIt(frame=frame, range=hull):
                    assert hull[0] <= wanted[0] < wanted[1] <= hull[1]
                    assert hull[0] // FRAME == (hull[1] - 1) // FRAME
                    self.reading[use] = (file, wanted, hull, frame)
                case Ready(frame=frame, nbytes=nbytes):
                    assert nbytes == wanted[1] - wanted[0]
                    self.copying[use] = (file, wanted, frame)
                case ReadAlone():
                    self.take(action.rank, file, wanted, FILES[file][slice(*wanted)])
                    self.read += [(file, byte) for byte in range(*wanted)]

    def take(self, rank, file, wanted, data):
        assert data == FILES[file][slice(*wanted)], "bytes of something else"
        self.got[rank].append((file, wanted))

    def announce(self, rank):
        self.hear(Opened(rank))
        for file in FILES:
            ranges = tuple(wanted for name, wanted in self.todo[rank] if name == file)
            self.hear(Wants(rank, file, ranges))
        self.hear(Begun(rank))

    def claim(self, rank):
        if self.todo[rank]:
            file, wanted = self.todo[rank].pop(0)
            self.number += 1
            self.claims[(rank, self.number)] = (file, wanted)
            self.hear(Claim(rank, self.number, file, wanted))

    def skip(self, rank):
        if self.todo[rank]:
            file, wanted = self.todo[rank].pop(0)
            self.hear(Skipped(rank, file, wanted))
            self.got[rank].append((file, wanted))

    def finish(self, use, *, good=True):
        """Do what was answered. The bytes move now: whoever is slow does so long after it was told to."""
        rank, number = use
        if use in self.reading:
            file, wanted, hull, frame = self.reading.pop(use)
            if good:
                at = frame * FRAME + hull[0] % FRAME
                self.segment[at : at + hull[1] - hull[0]] = FILES[file][slice(*hull)]
                self.read += [(file, byte) for byte in range(*hull)]
            if rank not in self.dead:
                self.take(rank, file, wanted, FILES[file][slice(*wanted)])
                self.hear(Done(rank, number, good))
        elif use in self.copying:
            file, wanted, frame = self.copying.pop(use)
            at = frame * FRAME + wanted[0] % FRAME
            data = bytes(self.segment[at : at + wanted[1] - wanted[0]])
            if rank not in self.dead:
                self.take(rank, file, wanted, data)
                self.hear(Done(rank, number))

    def is_busy(self, rank):
        return any(use[0] == rank for use in [*self.claims, *self.reading, *self.copying])

    def leave(self, rank):
        if rank not in self.dead | self.left and not self.todo[rank] and not self.is_busy(rank):
            self.left.add(rank)
            self.hear(Left(rank))

    def die(self, rank):
        """Its session ends; its process may be stopped and go on later with what it was doing."""
        self.dead.add(rank)
        self.claims = {use: claim for use, claim in self.claims.items() if use[0] != rank}
        self.todo[rank] = []
        self.hear(Lost(rank))


ranges = st.builds(
    lambda file, cell, begin, length: (file, (cell * FRAME + begin, cell * FRAME + min(FRAME, begin + length))),
    st.sampled_from(sorted(FILES)),
    st.integers(0, 4),
    st.integers(0, FRAME - 1),
    st.integers(1, FRAME),
)
WHOLE = [(file, (cell * FRAME, (cell + 1) * FRAME)) for file in FILES for cell in range(5)]
worlds = st.lists(st.lists(ranges, max_size=8) | st.just(WHOLE), min_size=2, max_size=4)


@settings(max_examples=150, deadline=None)
@given(worlds, st.data())
def test_every_claim_is_answered_with_the_right_bytes(world, data):
    node = Node([list(wanted) for wanted in world])
    wanted = {rank: list(todo) for rank, todo in node.todo.items()}
    begun = set()
    for _ in range(data.draw(st.integers(0, 60))):
        rank = data.draw(st.sampled_from(sorted(node.todo)))
        step = data.draw(st.sampled_from(["claim"] * 6 + ["finish"] * 6 + ["leave", "tick", "skip", "fail", "die"]))
        if rank in node.dead | node.left:
            continue
        if rank not in begun:
            begun.add(rank)
            node.announce(rank)
        uses = sorted(use for use in [*node.reading, *node.copying])
        match step:
            case "claim":
                node.claim(rank)
            case "skip":
                node.skip(rank)
            case "finish" | "fail" if uses:
                node.finish(data.draw(st.sampled_from(uses)), good=step == "finish")
            case "leave":
                node.leave(rank)
            case "tick":
                node.now_s += data.draw(st.sampled_from([0.1, 1.0, 2.5, 6.0]))
                node.hear(Tick())
            case "die":
                node.die(rank)
    bring_to_an_end(node, begun)
    for rank in node.todo:
        if rank not in node.dead:
            assert sorted(node.got[rank]) == sorted(wanted[rank])


def bring_to_an_end(node, begun):
    """Let all that live go on until they are through; what the dead were doing is never finished."""
    for _ in range(1000):
        for rank in node.todo:
            if rank not in node.dead:
                if rank not in begun:
                    begun.add(rank)
                    node.announce(rank)
                node.claim(rank)
        busy = [use for use in [*node.reading, *node.copying] if use[0] not in node.dead]
        for use in busy:
            node.finish(use)
        if not busy and not node.claims and not any(node.todo.values()):
            break
        node.now_s += 0.5
        node.hear(Tick())
    else:
        raise AssertionError(f"never answered: {node.claims}")


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 4), st.data())
def test_ranks_that_begin_together_and_keep_pace_read_every_byte_once(count, data):
    world = [data.draw(st.lists(st.sampled_from(WHOLE), unique=True)) for _ in range(count)]
    node = Node([sorted(wanted) for wanted in world])
    for rank in node.todo:
        node.announce(rank)
    while any(node.todo.values()) or node.claims or node.reading or node.copying:
        # whoever is behind goes first
        behind = min((todo[0] for todo in node.todo.values() if todo), default=None)
        for rank in data.draw(st.permutations(sorted(node.todo))):
            if node.todo[rank] and node.todo[rank][0] == behind:
                node.claim(rank)
        for use in data.draw(st.permutations(sorted([*node.reading, *node.copying]))):
            node.finish(use)
    for rank in node.todo:
        node.leave(rank)
    assert len(node.read) == len(set(node.read)), "a byte was read twice"
    assert set(node.read) == {(file, byte) for wanted in world for file, r in wanted for byte in range(*r)}


@settings(max_examples=60, deadline=None)
@given(worlds, st.data())
def test_a_zombie_writes_only_into_frames_that_nobody_else_was_given(world, data):
    """A rank is told to read, stops, is given up, and goes on much later: nobody may then get its bytes for others."""
    node = Node([list(wanted) for wanted in world])
    for rank in node.todo:
        node.announce(rank)
    for _ in range(data.draw(st.integers(1, 4))):
        node.claim(0)
    zombie = dict(node.reading)
    if data.draw(st.booleans()):
        node.die(0)
    for _ in range(data.draw(st.integers(0, 40))):
        rank = data.draw(st.sampled_from([rank for rank in node.todo if rank]))
        node.claim(rank)
        for use in [use for use in [*node.reading, *node.copying] if use[0] and data.draw(st.booleans())]:
            node.finish(use)
        node.now_s += data.draw(st.sampled_from([0.0, 1.0, 3.0]))
        node.hear(Tick())
        for use in zombie:  # it writes, again and again
            if use in node.reading:
                file, _, hull, frame = node.reading[use]
                at = frame * FRAME + hull[0] % FRAME
                node.segment[at : at + hull[1] - hull[0]] = FILES[file][slice(*hull)]
