"""The journal: what a daemon that is killed leaves to its successor, in a sqlite file in the state directory.

A record is with the kernel when a call returns, so it survives the death of the process at any moment; it is not
fsynced, because after a loss of power the arenas that it speaks of are gone, too. Invariants: whatever the file holds,
a journal opens; one that is damaged, or of another version, is put aside and a new one begun. What a successor finds
was true: a journal that once could not be written is removed rather than left with a gap.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator
from typing import Any, Final, TypeVar, get_type_hints

from ckptd.daemon.recovery.records import SCHEMA_VERSION, TABLES, Record
from ckptd.protocol.errors import SystemCallFailed

logger = logging.getLogger(__name__)

_FILE: Final = "journal.db"
_ENDINGS: Final = ("", "-wal", "-shm")
_LOCK: Final = "lock"
_COLUMN: Final = {int: "INTEGER", bool: "INTEGER", float: "REAL", bytes: "BLOB"}
# The write-ahead log is put into the main file beside the loop, in a thread; bytes.
_TIDY_BYTES: Final = 1 << 20

R = TypeVar("R", bound=Record)


def try_lock(directory: str) -> int | None:
    """Take the lock of a state directory; return its descriptor, or None if a live daemon holds it.

    Raises:
        SystemCallFailed: The directory cannot be made or entered.
    """
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        descriptor = os.open(os.path.join(directory, _LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise SystemCallFailed("lock", directory, error.errno or 0) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def journal_file(directory: str) -> str:
    """Return the path of the journal in a state directory."""
    return os.path.join(directory, _FILE)


class Journal:
    """An open journal.

    Args:
        directory: The state directory; its lock must be held.

    Raises:
        SystemCallFailed: The file cannot be made.
    """

    def __init__(self, directory: str) -> None:
        self.path = journal_file(directory)
        self._kept = True
        try:
            self._database = _open(self.path)
        except (sqlite3.DatabaseError, _Foreign) as error:
            self._put_aside(error)
            try:
                self._database = _open(self.path)
            except sqlite3.Error as again:
                raise SystemCallFailed(f"sqlite ({again})", self.path, 0) from None

    def _put_aside(self, error: Exception) -> None:
        aside = f"{self.path}.{int(time.time())}"
        logger.error("the journal %s cannot be used (%s): it is now %s, a new one is begun", self.path, error, aside)
        for ending in _ENDINGS:
            with contextlib.suppress(FileNotFoundError):
                os.rename(self.path + ending, aside + ending)

    @property
    def kept(self) -> bool:
        """Whether a successor will find what is written; not after the disk has refused a record."""
        return self._kept

    def put(self, *records: Record) -> None:
        """Keep records, all or none of them; those with the same key are replaced."""
        self.change(*records)

    def remove(self, kind: type[Record], **where: int | str | bytes) -> None:
        """Forget the records of a kind whose columns have these values."""
        self.change(removed=[(kind, where)])

    def change(self, *put: Record, removed: Iterable[tuple[type[Record], dict[str, int | str | bytes]]] = ()) -> None:
        """Forget some records and keep others, in one step."""
        removed = list(removed)
        try:
            self._change(put, removed)
        except sqlite3.OperationalError as error:  # no room, no rights, an input/output error
            self._go_on_without(error)
            self._change(put, removed)

    def _change(
        self, put: Iterable[Record], removed: Iterable[tuple[type[Record], dict[str, int | str | bytes]]]
    ) -> None:
        with self._database as database:
            for kind, where in removed:
                condition = " AND ".join(f"{name} = ?" for name in where)
                database.execute(f"DELETE FROM {kind.table} WHERE {condition}", list(where.values()))
            for record in put:
                fields = record.__struct_fields__
                marks = ", ".join("?" * len(fields))
                values = [getattr(record, name) for name in fields]
                database.execute(
                    f"INSERT OR REPLACE INTO {record.table} ({', '.join(fields)}) VALUES ({marks})", values
                )

    def _go_on_without(self, error: sqlite3.Error) -> None:
        """Keep records in memory only: saves go on, but nothing of them outlives this daemon."""
        logger.error(
            "the journal %s cannot be written (%s): saves go on, but those under way die with this daemon",
            self.path, error,
        )  # fmt: skip
        copy = sqlite3.connect(":memory:")
        self._database.backup(copy)
        self._database.close()
        self._remove_files()
        self._database, self._kept = copy, False

    def _remove_files(self) -> None:
        for ending in _ENDINGS:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path + ending)

    def read(self, kind: type[R], **where: int | str | bytes) -> Iterator[R]:
        """Yield the records of a kind, those that were kept last at the end."""
        condition = " AND ".join(f"{name} = ?" for name in where) or "1"
        fields = kind.__struct_fields__
        types = get_type_hints(kind)
        query = f"SELECT {', '.join(fields)} FROM {kind.table} WHERE {condition} ORDER BY rowid"
        for row in self._database.execute(query, list(where.values())).fetchall():
            values: dict[str, Any] = dict(zip(fields, row, strict=True))
            yield kind(**{name: bool(v) if types[name] is bool else v for name, v in values.items()})

    @property
    def wants_tidying(self) -> bool:
        """Whether the write-ahead log has grown so much that :meth:`tidy` is worth its time."""
        try:
            return os.stat(f"{self.path}-wal").st_size > _TIDY_BYTES
        except FileNotFoundError:
            return False

    def tidy(self) -> None:
        """Bring the write-ahead log into the main file; for a thread, because it waits for the disk."""
        with (
            contextlib.suppress(sqlite3.OperationalError),
            contextlib.closing(sqlite3.connect(self.path, timeout=0.0)) as database,
        ):
            database.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def close(self, *, emptied: bool = False) -> None:
        """Close the file; ``emptied``: nothing is left for a successor, so it goes."""
        self._database.close()
        if emptied:
            self._remove_files()


class _Foreign(Exception):
    """The file is a journal of another version."""


def _open(path: str) -> sqlite3.Connection:
    before = os.umask(0o077)
    try:
        database = sqlite3.connect(path, timeout=5.0)
        # WAL: a commit is one write(2). No fsync in the loop: see the module's text, and Journal.tidy.
        for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "wal_autocheckpoint = 0"):
            database.execute(f"PRAGMA {pragma}")
        version = database.execute("PRAGMA user_version").fetchone()[0]
        empty = not database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if not empty and version != SCHEMA_VERSION:
            database.close()
            raise _Foreign(f"version {version}, this daemon writes {SCHEMA_VERSION}")
        with database:
            for kind in TABLES:
                database.execute(_definition(kind))
            database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        return database
    finally:
        os.umask(before)


def _definition(kind: type[Record]) -> str:
    types = get_type_hints(kind)
    columns = ", ".join(f"{name} {_COLUMN.get(types[name], 'TEXT')} NOT NULL" for name in kind.__struct_fields__)
    return f"CREATE TABLE IF NOT EXISTS {kind.table} ({columns}, PRIMARY KEY ({', '.join(kind.key)}))"
