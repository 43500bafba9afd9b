"""From where a load's bytes come, and when it begins again."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from ckptd.checkpoint.folder.locks import lock_for_removal
from ckptd.checkpoint.reading.files import Disk
from ckptd.checkpoint.reading.read import ReadCount
from ckptd.client.loading import sources as load_sources
from ckptd.client.loading.plan import LoadPlan
from ckptd.client.loading.sources import ONLY_DISK, Sources, bring, of_one_save
from ckptd.protocol.errors import MissingFile, MissingKeys, Unsupported, WrongBits


class Retained:
    """A save in memory that brings what it is told to."""

    name = "memory"

    def __init__(self, count):
        self.count, self.asked = count, []

    def find(self, save_id):
        self.asked.append(save_id)
        return self

    def read(self, reads):
        return self.count


@pytest.fixture
def plans(monkeypatch):
    """The plans that are made; all are read from the disk without looking."""
    monkeypatch.setattr(load_sources, "read_all", lambda reads, source: ReadCount(len(reads), 7))
    return []


def index(*, save_id="save", has_hashes=True):
    return SimpleNamespace(header={"save_id": save_id} if save_id else {}, has_hashes=has_hashes)


def make(plans, reads=("a read",)):
    def plan():
        plans.append(LoadPlan(reads=list(reads)))
        return plans[-1]

    return plan


def test_what_memory_has_brought_counts(plans):
    retained = Retained(ReadCount(1, 2))
    brought = bring(make(plans), index(), Disk(), Sources(retained.find))
    assert (brought.source, brought.count, retained.asked) == ("memory", ReadCount(1, 2), ["save"])
    assert brought.plan is plans[0]


def test_what_does_not_count_is_planned_anew_because_its_buffers_are_gone(plans):
    brought = bring(make(plans), index(), Disk(), Sources(Retained(None).find))
    assert (brought.source, brought.count.read_bytes, len(plans)) == ("disk", 7, 2)
    assert brought.plan is plans[1]


@pytest.mark.parametrize(
    ("kind", "reads"),
    [({"save_id": ""}, ["a read"]), ({"has_hashes": False}, ["a read"]), ({}, [])],
    ids=["no save id", "of stock", "nothing to read"],
)
def test_nobody_is_asked_for_what_cannot_be_there(plans, kind, reads):
    retained = Retained(ReadCount(1, 2))
    assert bring(make(plans, reads), index(**kind), Disk(), Sources(retained.find)).source == "disk"
    assert (retained.asked, len(plans)) == ([], 1)


def test_the_nodes_cache_is_read_over_the_opened_checkpoint(plans):
    disk = Disk()
    cache = SimpleNamespace(name="node cache", over=lambda below: cache if below is disk else None)
    assert bring(make(plans), index(), disk, Sources(cache=cache)).source == "node cache"


class Attempts:
    """Attempts that do one thing after the other to a checkpoint; the last one brings something."""

    def __init__(self, path, *turns):
        self.path, self.turns, self.sources = path, list(turns), []

    def __call__(self, directory, sources):
        self.sources.append(sources)
        os.close(directory.open(f"{directory.path}/file", os.O_RDONLY))
        if not self.turns:
            return "brought"
        return self.turns.pop(0)(self.path)


def replace(path):
    """Another checkpoint takes the name."""
    old = path.rename(path.with_name(f"old{len(os.listdir(path.parent))}"))
    path.mkdir()
    (path / "file").write_bytes((old / "file").read_bytes() + b"!")


def write_into(path):
    (path / "file").write_bytes((path / "file").read_bytes() + b"!")


def failing(change, error):
    def turn(path):
        change(path)
        raise error

    return turn


@pytest.fixture
def path(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_bytes(b"1")
    return tmp_path / "a"


def test_the_first_attempt_gets_all_sources_and_the_others_the_disk(path):
    sources = Sources()
    attempts = Attempts(path, write_into, write_into)
    assert of_one_save(str(path), sources, attempts) == "brought"
    assert attempts.sources == [sources, ONLY_DISK, ONLY_DISK]


def test_what_is_loaded_again_is_held_while_it_is_read(path):
    def replace_by_one_with_an_index(path):
        replace(path)
        (path / ".ckptd").touch()
        raise MissingFile("f")

    held = Attempts(path, replace_by_one_with_an_index, lambda path: lock_for_removal(str(path)))
    assert of_one_save(str(path), ONLY_DISK, held) is None


def test_what_was_read_of_the_old_one_stands_when_a_new_one_takes_its_name(path):
    attempts = Attempts(path, lambda path: [replace(path), "old"][1])
    assert of_one_save(str(path), ONLY_DISK, attempts) == "old"
    assert len(attempts.sources) == 1


@pytest.mark.parametrize(
    "error",
    [WrongBits("f", "w", 0), MissingFile("f"), MissingKeys("/a", 1, "w")],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("change", [replace, write_into])
def test_a_failure_of_what_was_replaced_is_none(path, error, change):
    attempts = Attempts(path, failing(change, error))
    assert of_one_save(str(path), ONLY_DISK, attempts) == "brought"


def test_a_failure_of_what_stands_as_it_was_is_told_at_once(path):
    attempts = Attempts(path, failing(lambda _: None, MissingFile("f")))
    with pytest.raises(MissingFile):
        of_one_save(str(path), ONLY_DISK, attempts)
    assert len(attempts.sources) == 1


def test_attempts_are_bounded(path):
    with pytest.raises(Unsupported, match="others save into it"):
        of_one_save(str(path), ONLY_DISK, Attempts(path, *[write_into] * 99))
    attempts = Attempts(path, *[failing(replace, MissingFile("f"))] * 99)
    with pytest.raises(MissingFile):
        of_one_save(str(path), ONLY_DISK, attempts)
    assert len(attempts.sources) == 10
