"""A journal on a full disk."""

from __future__ import annotations

from ckptd.daemon.recovery.journal import Journal
from ckptd.daemon.recovery.records import SessionRecord, VerdictRecord


def test_a_full_disk_costs_the_journal_not_the_saves(mounts, caplog):
    small = mounts.tmpfs(mib=1)
    journal = Journal(str(small))
    session = SessionRecord(token=b"t", job=1, rank=0, incarnation=1, pid=77, started_ticks=5, live=True)
    journal.put(session)
    for number in range(3000):
        journal.put(VerdictRecord(job=1, incarnation=1, sequence=number, save_id="s", error=b"x" * 1000))
    assert not journal.kept
    assert "saves go on" in caplog.text
    assert len(list(journal.read(VerdictRecord))) == 3000
    assert list(journal.read(SessionRecord)) == [session]
    # A successor must not find a journal with a gap.
    assert list(small.iterdir()) == []
    journal.tidy()
    journal.close()
