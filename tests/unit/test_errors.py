"""Every error: one line of prose, and the same facts on the other side of a process border."""

from __future__ import annotations

import dataclasses
import pickle

import msgspec
import pytest

from ckptd.protocol.errors import (
    BY_CODE,
    BadPlan,
    CkptdError,
    DiskFull,
    ErrorReport,
    Mismatch,
    ProtocolMismatch,
    RankFailed,
    RankLost,
    SlotsBusy,
    SystemCallFailed,
    UnexpectedError,
    for_rank,
    from_report,
)

SAMPLES = {"str": "some text", "int": 5, "float": 1.5}
KINDS = sorted(BY_CODE.values(), key=lambda kind: kind.code)
LEAVES = [kind for kind in KINDS if kind is not CkptdError]


def sample(kind: type[CkptdError]) -> CkptdError:
    return kind(**{field.name: SAMPLES[field.type] for field in dataclasses.fields(kind)})


def all_kinds(kind: type = CkptdError) -> set[type]:
    return {kind}.union(*(all_kinds(sub) for sub in kind.__subclasses__()))


def leaf_kinds() -> set[type]:
    """The kinds of the tree itself; others derive from them to be caught by torch's names, too."""
    ours = {kind for kind in all_kinds() if kind.__module__.startswith("ckptd.protocol.")}
    return {kind for kind in ours if not ours.intersection(kind.__subclasses__())}


def test_every_leaf_has_a_code_of_its_own():
    assert leaf_kinds() == set(LEAVES)
    codes = [kind.code for kind in leaf_kinds()]
    assert len(set(codes)) == len(codes) >= 30


@pytest.mark.parametrize("kind", LEAVES, ids=lambda kind: kind.code)
class TestEveryLeaf:
    def test_is_told_in_one_line(self, kind):
        text = str(sample(kind))
        assert text
        assert "\n" not in text
        assert text == text.strip()

    def test_comes_through_a_process_border_as_it_was(self, kind):
        error = sample(kind)
        wire = msgspec.msgpack.encode(error.report())
        received = from_report(msgspec.msgpack.decode(wire, type=ErrorReport))
        assert type(received) is kind
        assert vars(received) == vars(error)
        assert str(received) == str(error)

    def test_is_a_runtime_error_and_hashable(self, kind):
        assert isinstance(sample(kind), RuntimeError)
        assert len({sample(kind), sample(kind)}) == 2

    def test_with_facts_that_do_not_fit_becomes_unexpected_and_tells_them(self, kind):
        facts = {**sample(kind).report().facts, "more": 7}
        received = from_report(ErrorReport(kind.code, facts))
        assert isinstance(received, UnexpectedError)
        assert str(received).startswith(f"{kind.code}: ")
        assert "more=7" in str(received)

    def test_with_facts_of_any_type_can_still_be_told(self, kind):
        for value in ("text", -1, 2**63, 0.5, None):
            facts = dict.fromkeys(sample(kind).report().facts, value)
            assert str(from_report(ErrorReport(kind.code, facts))) is not None


@pytest.mark.parametrize("code", ["a_code_of_tomorrow", "error", ""])
def test_an_unknown_code_becomes_unexpected_and_tells_its_facts(code):
    received = from_report(ErrorReport(code, {"a": 1, "b": "two"}))
    assert str(received) == f"{code}: a=1, b=two"
    assert isinstance(received, UnexpectedError)


def test_a_rank_is_named_once():
    lost = RankLost(3, 4711, "died")
    assert for_rank(1, lost) is lost
    failed = for_rank(1, DiskFull("/runs", 10, 3))
    assert failed.report() == RankFailed(1, "disk_full", str(DiskFull("/runs", 10, 3))).report()
    assert for_rank(2, failed) is failed


def test_a_failed_call_says_what_the_system_said():
    assert str(SystemCallFailed("pwrite", "/a/b", 28)) == "pwrite /a/b: No space left on device (errno 28)"


@pytest.mark.parametrize(("client", "older"), [(1, "client"), (3, "daemon")])
def test_the_older_side_is_to_be_upgraded(client, older):
    assert f"upgrade the {older} " in str(ProtocolMismatch(client, 2))


def test_seconds_are_rounded_for_people():
    assert "after 1.2 s" in str(SlotsBusy(2, 1.2345))


@pytest.mark.parametrize("kind", LEAVES, ids=lambda kind: kind.code)
def test_an_error_made_with_keywords_comes_back_from_a_pickle(kind):
    error = sample(kind)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert vars(again) == vars(error)
    assert str(again) == str(error)


@pytest.mark.parametrize("kind", [BadPlan, Mismatch])
def test_what_torch_raises_as_a_value_error_is_one(kind):
    assert isinstance(sample(kind), ValueError)
