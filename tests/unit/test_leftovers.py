"""What dead saves have left: removed where it is provably theirs, named back where it is the last copy, else kept."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
from pathlib import Path

import pytest
from support.checkpoints import FILES, write_checkpoint

from ckptd.checkpoint.indexing.index import encode_index
from ckptd.checkpoint.indexing.open import read_index
from ckptd.checkpoint.names import hidden_directory, set_aside, split_hidden
from ckptd.checkpoint.publishing import leftovers as leftovers_module
from ckptd.checkpoint.publishing.leftovers import Fate, Leftover, discard_save, fate_of, sweep
from ckptd.protocol.errors import BadMessage, SystemCallFailed

FACTS = [field.name for field in dataclasses.fields(Leftover)]
DEAD = {"dead"}


def leftover(*true: str) -> Leftover:
    return Leftover(**{name: name in true for name in FACTS})


class TestTheRules:
    @pytest.mark.parametrize(
        ("facts", "fate"),
        [
            ((), Fate.REMOVE),  # a save cut short
            (("id_exists", "id_complete"), Fate.REMOVE),
            (("own", "complete", "has_metadata"), Fate.REMOVE),  # whole, but told to have failed
            (("own", "complete", "has_metadata", "foreign", "id_exists", "id_complete"), Fate.REMOVE),
            (("complete", "has_metadata", "id_exists", "id_complete"), Fate.CLEAR_AWAY),
            (("foreign", "id_exists", "id_complete"), Fate.CLEAR_AWAY),
            (("set_aside", "complete", "has_metadata", "id_exists", "id_complete"), Fate.CLEAR_AWAY),
            (("complete", "has_metadata"), Fate.NAME_BACK),
            (("set_aside", "complete", "has_metadata"), Fate.NAME_BACK),
            (("set_aside", "foreign"), Fate.NAME_BACK),  # a folder that was no checkpoint
            (("complete", "has_metadata", "id_exists"), Fate.KEEP),  # what stands there is no checkpoint
            (("has_metadata",), Fate.KEEP),
            (("foreign",), Fate.KEEP),
            (("set_aside", "has_metadata"), Fate.KEEP),
        ],
        ids=lambda value: "+".join(value) or "nothing" if isinstance(value, tuple) else value.value,
    )
    def test_what_becomes_of(self, facts, fate):
        assert fate_of(leftover(*facts)) is fate

    def test_no_state_loses_the_last_copy(self):
        for true in itertools.product([False, True], repeat=len(FACTS)):
            found = Leftover(**dict(zip(FACTS, true, strict=True)))
            gone = fate_of(found) in {Fate.REMOVE, Fate.CLEAR_AWAY}
            written_by_it = found.own and not found.set_aside
            if gone and not written_by_it and (found.complete and found.has_metadata):
                assert found.id_complete
            if gone and not written_by_it and found.foreign:
                assert found.id_exists
            if fate_of(found) is Fate.NAME_BACK:
                assert not found.id_exists


class Place:
    """A checkpoint id and the hidden directory of a dead save of it."""

    def __init__(self, directory: Path) -> None:
        self.parent = directory
        self.id = directory / "step-7"
        self.hidden = Path(hidden_directory(str(self.id), "dead"))
        self.aside = Path(set_aside(str(self.hidden)))

    def checkpoint(self, path: Path, save_id: str, *foreign: str) -> None:
        """Make a checkpoint with the index of a save, and files of a user."""
        path.mkdir()
        index = write_checkpoint(path)
        (path / ".ckptd").write_bytes(encode_index(dataclasses.replace(index, header={"save_id": save_id})))
        (path / ".metadata").write_bytes(b"stock's")
        for name in foreign:
            (path / name).write_text(f"beside {save_id}")

    def cut_short(self) -> None:
        """Make what a save leaves that is killed while it writes."""
        self.hidden.mkdir()
        (self.hidden / FILES[0]).write_bytes(bytes(4096))

    def names(self) -> list[str]:
        return sorted(os.listdir(self.parent))

    def standing(self) -> str:
        return read_index(str(self.id)).header["save_id"]


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path)


@pytest.fixture(params=["of the directory", "of the parent"])
def swept(request, place):
    """Sweep, told either of the two paths."""
    return lambda: sweep(str(place.hidden if request.param == "of the directory" else place.parent), DEAD)


class TestSweep:
    @pytest.mark.parametrize("old", [False, True])
    @pytest.mark.parametrize("whole", [False, True])
    def test_a_save_that_was_never_published_goes(self, place, swept, old, whole):
        if old:
            place.checkpoint(place.id, "old", "notes.txt")
        place.checkpoint(place.hidden, "dead", "notes.txt") if whole else place.cut_short()
        assert swept().removed == [str(place.hidden)]
        assert place.names() == (["step-7"] if old else [])
        assert not old or place.standing() == "old"

    def test_what_a_published_save_has_replaced_goes_and_late_files_are_kept(self, place, swept):
        place.checkpoint(place.id, "dead", "notes.txt")
        place.checkpoint(place.hidden, "old", "late.txt")
        assert swept().removed == [str(place.hidden)]
        assert place.names() == ["step-7"]
        assert place.standing() == "dead"
        assert (place.id / "late.txt").read_text() == "beside old"

    def test_a_folder_that_was_no_checkpoint_loses_no_file(self, place, swept):
        place.checkpoint(place.id, "dead")
        place.hidden.mkdir()
        (place.hidden / "late.txt").write_text("mine")
        swept()
        assert place.names() == ["step-7"]
        assert (place.id / "late.txt").read_text() == "mine"

    def test_the_last_copy_of_a_checkpoint_is_named_back(self, place, swept):
        place.checkpoint(place.hidden, "old", "notes.txt")
        assert swept().named_back == [str(place.hidden)]
        assert place.names() == ["step-7"]
        assert place.standing() == "old"
        assert (place.id / "notes.txt").exists()

    @pytest.mark.parametrize("whole", [True, False])
    def test_what_was_set_aside_between_two_renames_is_named_back(self, place, swept, whole):
        place.checkpoint(place.hidden, "dead")
        if whole:
            place.checkpoint(place.aside, "old")
        else:
            place.aside.mkdir()
        found = swept()
        assert (found.named_back, found.removed) == ([str(place.aside)], [str(place.hidden)])
        assert place.names() == ["step-7"]
        assert not whole or place.standing() == "old"

    def test_what_was_set_aside_goes_when_the_new_one_stands(self, place):
        place.checkpoint(place.id, "dead")
        place.checkpoint(place.aside, "old", "late.txt")
        assert sweep(str(place.parent), DEAD).removed == [str(place.aside)]
        assert sorted(path.name for path in place.id.iterdir()) == [".ckptd", ".metadata", *FILES, "late.txt"]

    @pytest.mark.parametrize("damage", ["a file is short", "a file is missing", "the index is damaged"])
    @pytest.mark.parametrize("where", ["under the id", "nowhere else"])
    def test_what_is_damaged_neither_replaces_nor_is_named_back(self, place, swept, damage, where):
        place.checkpoint(place.hidden, "old")
        damaged = place.hidden
        if where == "under the id":
            place.checkpoint(place.id, "dead")
            damaged = place.id
        if damage == "a file is short":
            os.truncate(damaged / FILES[1], 10)
        elif damage == "a file is missing":
            (damaged / FILES[1]).unlink()
        else:
            (damaged / ".ckptd").write_bytes(b"nonsense")
        before = place.names()
        assert set(swept().kept) == {str(place.hidden)}
        assert place.names() == before

    def test_the_living_are_left_alone(self, place):
        living = Path(hidden_directory(str(place.id), "living"))
        living.mkdir()
        (place.parent / ".notes.ckptd-").mkdir()
        (place.parent / "step-6.ckptd-dead").mkdir()
        before = place.names()
        assert sweep(str(place.parent), DEAD) == sweep(str(living), DEAD)
        assert place.names() == before

    def test_nothing_there_is_no_error(self, place):
        assert sweep(str(place.hidden), DEAD).kept == {}
        with pytest.raises(SystemCallFailed, match="readdir"):
            sweep(str(place.parent / "missing"), DEAD)

    @pytest.mark.parametrize("what", ["file", "link"])
    def test_what_no_save_makes_is_kept(self, place, swept, what):
        (place.parent / "elsewhere").mkdir()
        place.hidden.touch() if what == "file" else place.hidden.symlink_to("elsewhere")
        assert "Not a directory" in swept().kept[str(place.hidden)]
        assert os.path.lexists(place.hidden)

    def test_one_that_cannot_be_removed_does_not_keep_the_others(self, place, monkeypatch):
        other = Path(hidden_directory(str(place.parent / "step-8"), "dead"))
        other.mkdir()
        place.cut_short()
        real = leftovers_module.discard

        def fail(path):
            if path == str(other):
                raise SystemCallFailed("unlink", path, errno.EIO)
            real(path)

        monkeypatch.setattr(leftovers_module, "discard", fail)
        found = sweep(str(place.parent), DEAD)
        assert found.removed == [str(place.hidden)]
        assert "Input/output error" in found.kept[str(other)]

    @pytest.mark.parametrize("state", ["taken back", "replaced", "named back"])
    def test_names_are_durable_before_anything_goes(self, place, swept, state, monkeypatch):
        """A rename that nobody synced may be undone by a power failure: the id then means what was hidden."""
        if state == "replaced":
            place.checkpoint(place.id, "dead")
        place.checkpoint(place.hidden, "dead" if state == "taken back" else "old")

        def fail(path):
            raise SystemCallFailed("fsync", path, errno.EIO)

        before = place.names()
        monkeypatch.setattr(leftovers_module, "sync_directory", fail)
        assert "fsync" in swept().kept[str(place.hidden)]
        assert place.names() == before

    def test_names_go_back_without_renameat2_too(self, place, swept, monkeypatch):
        monkeypatch.setattr(leftovers_module, "rename_new", lambda source, target: False)
        place.checkpoint(place.hidden, "old")
        swept()
        assert place.names() == ["step-7"]


class TestDiscardSave:
    def test_a_save_cut_short_goes_without_a_sync(self, place, monkeypatch):
        monkeypatch.setattr(leftovers_module, "sync_directory", None)
        place.cut_short()
        discard_save(str(place.hidden))
        discard_save(str(place.hidden))
        assert place.names() == []

    def test_what_a_save_has_replaced_that_is_told_to_have_failed_stays(self, place):
        place.checkpoint(place.id, "dead")
        place.checkpoint(place.hidden, "old")
        discard_save(str(place.hidden))
        assert place.names() == [place.hidden.name, "step-7"]

    def test_a_users_folder_that_got_the_hidden_name_stays(self, place):
        place.checkpoint(place.id, "dead")
        place.hidden.mkdir()
        (place.hidden / "late.txt").write_text("mine")
        discard_save(str(place.hidden))
        assert (place.hidden / "late.txt").read_text() == "mine"

    def test_what_was_set_aside_is_named_back(self, place):
        place.checkpoint(place.hidden, "dead")
        place.checkpoint(place.aside, "old")
        discard_save(str(place.hidden))
        assert place.names() == ["step-7"]
        assert place.standing() == "old"

    def test_no_other_directory_is_ever_removed(self, place):
        place.checkpoint(place.id, "old")
        with pytest.raises(BadMessage, match="no hidden directory"):
            discard_save(str(place.id))
        assert place.standing() == "old"


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("/a/.step-7.ckptd-job-1-2-ab", ("/a/step-7", "job-1-2-ab", False)),
        ("/a/.step-7.ckptd-job.old", ("/a/step-7", "job", True)),
        ("/a/..b.ckptd-c.ckptd-d", ("/a/.b.ckptd-c", "d", False)),
        ("/a/.step-7.old.ckptd-x", ("/a/step-7.old", "x", False)),
        *[(path, None) for path in ("/a/step-7", "/a/step.ckptd-x", "/a/.ckptd-x", "/a/.b.ckptd-", "/a/.ckptd")],
    ],
)
def test_names_of_hidden_directories_are_taken_apart(path, parts):
    assert split_hidden(path) == parts
    if parts is not None:
        hidden = hidden_directory(parts[0], parts[1])
        assert path == (set_aside(hidden) if parts[2] else hidden)
