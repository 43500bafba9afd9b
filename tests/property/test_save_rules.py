"""Whatever order the events of a save come in, and whichever are lost or come twice."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.protocol.errors import DiskFull, RankLost
from ckptd.protocol.save import (
    Abandon,
    AnnounceCommit,
    Assign,
    Broke,
    Commit,
    ImageWritten,
    MakePlan,
    Planned,
    Proposed,
    Published,
    RankFell,
    RankHandedOver,
    RankSealed,
    SaveHandedOver,
    SaveRules,
    State,
    Write,
)

WORLD = 3
ID = "/runs/step-7"
PLANNED = (10, 20, 30)
often = settings(max_examples=100, deadline=None)


class Watched:
    """A save whose every answer is held against what was said before it."""

    def __init__(self, *, known: bool) -> None:
        self.save = SaveRules(WORLD, ("old",) * WORLD, PLANNED) if known else SaveRules(WORLD)
        self.said: list[object] = []
        self.seals: dict[int, RankSealed] = {}
        self.reports: dict[int, int] = {}
        self.asked: list[object] = []
        self.plan: Planned | None = None

    def hear(self, event: object) -> list[object]:
        decided, state = self.save.decided, (self.save.state, self.save.error)
        actions = self.save.handle(event)
        self.said.append(event)
        if decided:
            assert actions == []
            assert (self.save.state, self.save.error) == state
            return []
        match event:
            case RankSealed(rank=rank):
                self.seals.setdefault(rank, event)
            case ImageWritten(rank=rank, bytes_written=nbytes):
                if rank in self.seals:
                    self.reports[rank] = nbytes
        for action in actions:
            self._check(action)
            self.asked.append(action)
        return actions

    def _check(self, action: object) -> None:
        match action:
            case Write(rank):
                assert rank in self.seals
                assert action not in self.asked
            case MakePlan(fixed):
                assert not any(isinstance(asked, MakePlan) for asked in self.asked)
                digests = tuple("old" if rank in fixed else "new" for rank in range(WORLD))
                self.plan = Planned(digests, PLANNED)
            case Assign(rank):
                assert self.plan in self.said
                assert action not in self.asked
            case Commit():
                assert action not in self.asked
                digests = ("old",) * WORLD if self.plan is None else self.plan.digests
                for rank, planned in enumerate(PLANNED):
                    seal = self.seals[rank]
                    assert (seal.digest, seal.image_bytes) == (digests[rank], planned)
                    assert self.reports[rank] == planned
            case SaveHandedOver():
                assert action not in self.asked
                assert {said.rank for said in self.said if isinstance(said, RankHandedOver)} == set(range(WORLD))
                assert not any(isinstance(asked, Write | MakePlan | Commit) for asked in self.asked)
            case AnnounceCommit():
                assert (Commit() in self.asked) != (SaveHandedOver() in self.asked)
                assert Published() in self.said
        ends = [asked for asked in [*self.asked, action] if isinstance(asked, AnnounceCommit | Abandon)]
        assert len(ends) <= 1
        if self.save.state in {State.COMMITTED, State.FAILED}:
            assert len(ends) == 1


ranks = st.integers(0, WORLD - 1)
digests = st.sampled_from(["old", "old", "new"])
ids = st.sampled_from([ID] * 12 + ["/else"])


@st.composite
def seals(draw) -> RankSealed:
    rank = draw(ranks)
    short = draw(st.sampled_from([0] * 20 + [1]))
    return RankSealed(rank, draw(ids), draw(digests), PLANNED[rank] - short)


@st.composite
def reports(draw) -> ImageWritten:
    rank = draw(ranks)
    return ImageWritten(rank, PLANNED[rank] - draw(st.sampled_from([0] * 20 + [1])))


hand_overs = st.builds(RankHandedOver, ranks, ids)
proposals = st.builds(Proposed, ranks, ids, st.just("new"))
failures = st.builds(RankFell, ranks, st.just(RankLost(0, 1, "died"))) | st.builds(
    Broke, st.just(DiskFull("/", 1, 0)), st.none() | ranks
)
anything = st.lists(
    st.one_of(seals(), seals(), reports(), reports(), proposals, st.just("plan"), st.just(Published())),
    max_size=40,
)


@often
@given(st.booleans(), anything, st.lists(st.tuples(st.integers(0, 40), failures), max_size=2))
def test_it_never_commits_while_an_image_is_missing_or_short(known, events, bad_news):
    watched = Watched(known=known)
    for at, news in bad_news:
        events.insert(at, news)
    for event in events:
        if event != "plan":
            watched.hear(event)
        elif watched.plan is not None:
            watched.hear(watched.plan)


@often
@given(st.booleans(), st.lists(st.one_of(hand_overs, hand_overs, seals(), proposals, failures, st.just(Published()))))
def test_a_hand_over_is_saved_by_all_ranks_own_writers_or_not_at_all(known, events):
    watched = Watched(known=known)
    for event in events:
        watched.hear(event)


@st.composite
def disordered(draw, events: list[object]) -> list[object]:
    """Every event at least once, some more often, in any order."""
    twice = draw(st.lists(st.sampled_from(events), max_size=6))
    return draw(st.permutations([*events, *twice]))


@settings(often, max_examples=40)
@given(st.data(), st.sets(ranks))
def test_all_that_was_said_at_least_once_in_any_order_commits_once(data, changed):
    """A rank's own news keep their order, as a socket keeps it; those of different ranks may mix in any way."""
    watched = Watched(known=True)
    for event in data.draw(disordered([*(_first_word(rank, changed) for rank in range(WORLD))])):
        watched.hear(event)
    if changed:
        assert watched.plan is not None
        for event in data.draw(disordered([watched.plan])):
            watched.hear(event)
        for event in data.draw(disordered([RankSealed(rank, ID, "new", PLANNED[rank]) for rank in changed])):
            watched.hear(event)
    dead = data.draw(st.lists(st.builds(RankFell, ranks, st.just(RankLost(0, 1, "died"))), max_size=3))
    written = [ImageWritten(rank, nbytes) for rank, nbytes in enumerate(PLANNED)]
    for event in data.draw(disordered([*written, *dead])):
        watched.hear(event)
    assert watched.asked.count(Commit()) == 1
    for event in data.draw(disordered([Published()])):
        watched.hear(event)
    assert watched.save.state is State.COMMITTED
    assert watched.asked.count(AnnounceCommit()) == 1


def _first_word(rank: int, changed: set[int]) -> object:
    return Proposed(rank, ID, "new") if rank in changed else RankSealed(rank, ID, "old", PLANNED[rank])


@settings(often, max_examples=60)
@given(st.data(), ranks, st.sampled_from(["seal", "report"]))
def test_one_lost_event_is_never_made_up_for(data, rank, lost):
    news: list[object] = [RankSealed(r, ID, "old", nbytes) for r, nbytes in enumerate(PLANNED)]
    news += [ImageWritten(r, nbytes) for r, nbytes in enumerate(PLANNED)] + [Published()]
    gone = RankSealed if lost == "seal" else ImageWritten
    news = [event for event in news if not (isinstance(event, gone) and event.rank == rank)]
    watched = Watched(known=True)
    for event in data.draw(disordered(news)):
        watched.hear(event)
    assert Commit() not in watched.asked
    assert not watched.save.decided
