"""What the journal keeps: one record for each thing that must outlive the daemon. Facts only, no file is touched here.

Rule of change: a field that is added gets a default, and :data:`SCHEMA_VERSION` is raised when an older daemon could
misread a record; a journal of another version is not read.
"""

from __future__ import annotations

from typing import ClassVar, Final, Literal

import msgspec

SCHEMA_VERSION: Final = 1


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A row. Columns are the fields; those named by ``key`` are the primary key."""

    table: ClassVar[str]
    key: ClassVar[tuple[str, ...]]


class JobRecord(Record, frozen=True, kw_only=True):
    """A job, its roster, and where its files lie on tmpfs."""

    table: ClassVar[str] = "job"
    key: ClassVar[tuple[str, ...]] = ("job",)

    job: int
    uid: int
    gid: int
    name: str
    directory: str  # "" while there is none
    incarnation: int
    world_size: int
    launch: str


class SessionRecord(Record, frozen=True, kw_only=True):
    """One rank's session. One that is not ``live`` has ended, but its arenas are still needed."""

    table: ClassVar[str] = "session"
    key: ClassVar[tuple[str, ...]] = ("token",)

    token: bytes
    job: int
    rank: int
    incarnation: int
    pid: int
    started_ticks: int  # with the pid it names a process; see :class:`ckptd.daemon.session.sessions.Peer`
    live: bool


class ArenaRecord(Record, frozen=True, kw_only=True):
    """An arena of a session."""

    table: ClassVar[str] = "arena"
    key: ClassVar[tuple[str, ...]] = ("path",)

    path: str
    job: int
    token: bytes
    number: int
    slots: int
    slot_bytes: int


class PlanRecord(Record, frozen=True, kw_only=True):
    """A plan that is in force, or that a generation was staged under; its columns lie in the file ``path``."""

    table: ClassVar[str] = "plan"
    key: ClassVar[tuple[str, ...]] = ("path",)

    path: str
    job: int
    incarnation: int  # of the generation that it was made for
    sequence: int
    digests: bytes  # msgpack: list of text
    image_bytes: bytes  # msgpack: list of int
    in_force: bool
    committed: bool


class GenerationRecord(Record, frozen=True, kw_only=True):
    """A generation of which something is staged. ``error`` is the encoded report of one that failed."""

    table: ClassVar[str] = "generation"
    key: ClassVar[tuple[str, ...]] = ("job", "incarnation", "sequence")

    job: int
    incarnation: int
    sequence: int
    save_id: str
    checkpoint_id: str
    world_size: int
    plan_path: str  # "" for a hand-over
    begun_unix_s: float
    state: Literal["open", "failed", "committed"]
    error: bytes = b""


class SealRecord(Record, frozen=True, kw_only=True):
    """A rank's sealed slot: the message as it came, and the arena that it speaks of."""

    table: ClassVar[str] = "seal"
    key: ClassVar[tuple[str, ...]] = ("job", "incarnation", "sequence", "rank")

    job: int
    incarnation: int
    sequence: int
    rank: int
    message: bytes
    arena_path: str


class WaveRecord(Record, frozen=True, kw_only=True):
    """One wave of a rank's image, from its seal on; ``written``: it is in the file, and its slot is free again."""

    table: ClassVar[str] = "wave"
    key: ClassVar[tuple[str, ...]] = ("job", "incarnation", "sequence", "rank", "begin")

    job: int
    incarnation: int
    sequence: int
    rank: int
    begin: int
    message: bytes
    arena_path: str
    written: bool


class WrittenRecord(Record, frozen=True, kw_only=True):
    """A rank's image is durable: the worker's answer."""

    table: ClassVar[str] = "written"
    key: ClassVar[tuple[str, ...]] = ("job", "incarnation", "sequence", "rank")

    job: int
    incarnation: int
    sequence: int
    rank: int
    done: bytes


class VerdictRecord(Record, frozen=True, kw_only=True):
    """How a generation ended, for ranks that have not heard it. ``error`` is empty where it was committed."""

    table: ClassVar[str] = "verdict"
    key: ClassVar[tuple[str, ...]] = ("job", "incarnation", "sequence")

    job: int
    incarnation: int
    sequence: int
    save_id: str
    error: bytes
    metadata: bytes = b""


TABLES: Final[tuple[type[Record], ...]] = (
    JobRecord,
    SessionRecord,
    ArenaRecord,
    PlanRecord,
    GenerationRecord,
    SealRecord,
    WaveRecord,
    WrittenRecord,
    VerdictRecord,
)
