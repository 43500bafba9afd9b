"""The journal keeps records through the death of whoever wrote them, and opens whatever its file holds."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys

import pytest

from ckptd.daemon.job.generation import Generation, Seal
from ckptd.daemon.recovery.job_log import JobLog
from ckptd.daemon.recovery.journal import Journal, journal_file, try_lock
from ckptd.daemon.recovery.records import (
    SCHEMA_VERSION,
    TABLES,
    ArenaRecord,
    GenerationRecord,
    JobRecord,
    SealRecord,
    SessionRecord,
    VerdictRecord,
)
from ckptd.daemon.session.sessions import ArenaFile
from ckptd.protocol.errors import SaveSkipped, SystemCallFailed
from ckptd.protocol.messages import Sealed
from ckptd.protocol.save import Broke, SaveRules

SESSION = SessionRecord(token=b"t\0", job=1, rank=0, incarnation=2, pid=77, started_ticks=5, live=True)
ARENA = ArenaRecord(path="/a", job=1, token=b"t\0", number=3, slots=2, slot_bytes=8192)


def verdict(sequence: int, *, job: int = 1) -> VerdictRecord:
    return VerdictRecord(job=job, incarnation=1, sequence=sequence, save_id=f"s{sequence}", error=b"")


@pytest.fixture
def journal(tmp_path):
    journal = Journal(str(tmp_path))
    yield journal
    journal.close()


def test_what_is_put_is_read_with_its_types(journal):
    generation = GenerationRecord(
        job=1,
        incarnation=1,
        sequence=4,
        save_id="s",
        checkpoint_id="/runs/é",
        world_size=2,
        plan_path="",
        begun_unix_s=1.5,
        state="failed",
        error=b"\xff",
    )
    journal.put(SESSION, ARENA, generation)
    assert list(journal.read(SessionRecord)) == [SESSION]
    assert next(journal.read(SessionRecord)).live is True
    assert list(journal.read(ArenaRecord)) == [ARENA]
    assert list(journal.read(GenerationRecord, job=1, sequence=4)) == [generation]


def test_a_record_replaces_the_one_with_its_key(journal):
    journal.put(verdict(1), verdict(2))
    journal.put(VerdictRecord(job=1, incarnation=1, sequence=1, save_id="new", error=b"e"))
    assert {record.sequence: record.save_id for record in journal.read(VerdictRecord)} == {1: "new", 2: "s2"}


def test_records_are_found_and_forgotten_by_column(journal):
    journal.put(verdict(1), verdict(2), verdict(1, job=2))
    journal.remove(VerdictRecord, job=1)
    assert [record.job for record in journal.read(VerdictRecord)] == [2]
    assert list(journal.read(VerdictRecord, job=1)) == []


def test_a_change_happens_whole_or_not_at_all(journal):
    journal.put(verdict(1))
    bad = VerdictRecord(job=1, incarnation=1, sequence=2, save_id=object(), error=b"")  # type: ignore[arg-type]
    with pytest.raises(sqlite3.Error):
        journal.change(bad, removed=[(VerdictRecord, {"job": 1})])
    assert [record.sequence for record in journal.read(VerdictRecord)] == [1]


def test_a_record_survives_sigkill_in_the_next_statement(tmp_path):
    code = f"""
import os
from ckptd.daemon.recovery.journal import Journal
from ckptd.daemon.recovery.records import JobRecord
journal = Journal({str(tmp_path)!r})
journal.put(JobRecord(job=1, uid=0, gid=0, name="j", directory="", incarnation=3, world_size=1, launch=""))
os.kill(os.getpid(), 9)
"""
    died = subprocess.run([sys.executable, "-c", code], check=False, timeout=30)
    assert died.returncode == -9
    journal = Journal(str(tmp_path))
    assert [record.incarnation for record in journal.read(JobRecord)] == [3]
    journal.close()


@pytest.mark.parametrize("damage", ["random", "empty", "other version", "directory of nothing"])
def test_a_journal_opens_whatever_its_file_holds(tmp_path, caplog, damage):
    path = tmp_path / "journal.db"
    if damage == "random":
        path.write_bytes(os.urandom(16384))
    elif damage == "empty":
        path.touch()
    elif damage == "other version":
        with sqlite3.connect(path) as other:
            other.execute("CREATE TABLE session (x)")
            other.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
        other.close()
    journal = Journal(str(tmp_path))
    journal.put(SESSION)
    assert list(journal.read(SessionRecord)) == [SESSION]
    journal.close()
    aside = [file.name for file in tmp_path.iterdir() if file.name.startswith("journal.db.")]
    assert bool(aside) == (damage in {"random", "other version"})
    assert ("a new one is begun" in caplog.text) == bool(aside)


def test_a_directory_that_cannot_be_written_is_an_error_of_ours(tmp_path):
    with pytest.raises(SystemCallFailed, match=r"journal\.db"):
        Journal(str(tmp_path / "missing"))


def test_only_its_user_can_read_a_journal(journal):
    journal.put(SESSION)
    for name in os.listdir(os.path.dirname(journal.path)):
        mode = os.stat(os.path.join(os.path.dirname(journal.path), name)).st_mode
        assert stat.S_IMODE(mode) & 0o077 == 0, name


def test_the_write_ahead_log_stays_small_though_records_come_and_go(journal):
    largest = 0
    for number in range(900):
        journal.put(verdict(number % 7))
        if journal.wants_tidying:
            largest = max(largest, os.stat(f"{journal.path}-wal").st_size)
            journal.tidy()
    assert 0 < largest < 4 << 20
    assert os.stat(journal.path).st_size < 1 << 20


def test_a_late_seal_of_a_failed_save_does_not_make_it_live_again(journal):
    log = JobLog(journal, 1)
    generation = Generation(1, 4, "save", SaveRules(2, ("a", "b"), (8, 8), checkpoint_id="/runs/7"), None)
    arena = ArenaFile(1, "/arena", -1, 2, 8192)

    def seal(rank):
        message = Sealed(4, "/runs/7", "a", 1, 0, 4096, 4096, b"", 0.0, 0.0, 0.0)
        log.sealed(generation, rank, Seal(message, arena))

    seal(0)
    assert [record.state for record in journal.read(GenerationRecord)] == ["open"]
    generation.rules.handle(Broke(SaveSkipped("/runs/7", 1)))
    log.failed(generation, generation.rules.error.report())
    seal(1)
    assert [record.state for record in journal.read(GenerationRecord)] == ["failed"]
    assert len(list(journal.read(SealRecord))) == 2


def test_an_emptied_journal_leaves_no_file(tmp_path):
    journal = Journal(str(tmp_path))
    journal.put(SESSION)
    journal.close(emptied=True)
    assert list(tmp_path.iterdir()) == []
    assert journal_file(str(tmp_path)) == journal.path


def test_a_lock_is_held_by_one_and_dropped_with_its_descriptor(tmp_path):
    first = try_lock(str(tmp_path / "made" / "too"))
    assert first is not None
    assert try_lock(str(tmp_path / "made" / "too")) is None
    os.close(first)
    again = try_lock(str(tmp_path / "made" / "too"))
    assert again is not None
    os.close(again)


def test_every_table_has_a_key_of_its_own_columns():
    for kind in TABLES:
        assert set(kind.key) <= set(kind.__struct_fields__)
    assert len({kind.table for kind in TABLES}) == len(TABLES)
