"""Every message between client, daemon and workers; none of them carries payload bytes.

Rule of change: fields are only added, with a default, and :data:`PROTOCOL_VERSION` is raised when an old peer could
misread a message. :class:`Attach` keeps its first field for ever, so that any two versions can refuse each other.

Three conversations:
    attach socket   Attach, Resume, OpenArena, OpenCache, Drain -> Attached, ArenaOpened, CacheOpened, Drained, Refused
                    (Unix socket: credentials, descriptors; see :mod:`ckptd.protocol.retained`, too)
    message socket  Heartbeat ... Detach -> Echo ... Fenced                  (ZeroMQ; frames: token, body)
    worker socket   PlanTask ... DiscardTask -> PlanDone ... TaskFailed      (socket pair, length-prefixed)
"""

from __future__ import annotations

from typing import Annotated, Final, TypeVar

import msgspec

from ckptd.protocol.cache_messages import (
    CacheAnswer,
    CacheBegun,
    CacheClaim,
    CacheDone,
    CacheLeft,
    CacheOpened,
    CacheSkipped,
    CacheWants,
    OpenCache,
)
from ckptd.protocol.errors import BadMessage, ErrorReport
from ckptd.protocol.retained import OpenRetained, RetainedClosed, RetainedOpened
from ckptd.protocol.retention_messages import Keep, Retain, RetainDone, RetainTask, UserText
from ckptd.protocol.wave_messages import FinishWavesTask, WaveSealed, WaveWritten, WriteWaveTask
from ckptd.protocol.wire import Count, Hash, Message, Name, NBytes, Rank, Seconds, Sequence

PROTOCOL_VERSION: Final = 2

_T = TypeVar("_T")

DrainSeconds = Annotated[float, msgspec.Meta(ge=0, le=86_400)]  # no wait is without end

# An attach frame holds a few names; anything longer is not one of ours.
ATTACH_FRAME_LIMIT_BYTES: Final = 64 * 1024


# --- attach socket -----------------------------------------------------------------------------------------------


class Attach(Message, frozen=True, tag="attach"):
    """Client to daemon: open a session for one rank of a job."""

    protocol: int
    job: Name
    rank: Rank
    world_size: Count
    launch: str = ""  # names one start of the job, where the launcher tells; "" lets the daemon decide
    progress_timeout_s: Seconds = 0  # a save without news for so long fails; 0 is the daemon's own setting


class Resume(Message, frozen=True, tag="resume"):
    """Client to daemon: go on with a session whose connection, or whose daemon, is gone. Answer: Attached."""

    protocol: int
    token: bytes
    job: Name
    incarnation: int


class Attached(Message, frozen=True, tag="attached"):
    """Daemon to client: the session is open; ``token`` goes before every message."""

    token: bytes
    endpoint: str
    incarnation: int
    heartbeat_s: Seconds
    silence_s: Seconds
    pid: int
    version: str
    daemon: str  # another one for each daemon: ranks compare it to see that they reached the same
    user_code: bool = True  # whether users' own planners and writers may run in its workers
    embedded: bool = False  # a private daemon, which nobody but its clients starts again


class OpenArena(Message, frozen=True, tag="open_arena"):
    """Client to daemon: make an arena; the one before it, if any, is given up."""

    slots: Count
    slot_bytes: NBytes


class ArenaOpened(Message, frozen=True, tag="arena_opened"):
    """Daemon to client: the arena's descriptor comes with this frame."""

    arena: int
    slots: Count
    slot_bytes: NBytes


class Drain(Message, frozen=True, tag="drain"):
    """Whoever the daemon runs as, or root, to daemon, in place of Attach: take nothing new, finish what is sealed.

    The daemon stays so until it is started again.
    """

    protocol: int
    timeout_s: DrainSeconds


class Drained(Message, frozen=True, tag="drained"):
    """Daemon to whoever asked: all is finished, or ``unfinished`` saves are not and time is up."""

    unfinished: NBytes
    pid: int


class Refused(Message, frozen=True, tag="refused"):
    """Daemon to client: the request failed."""

    error: ErrorReport


# --- message socket, client to daemon ----------------------------------------------------------------------------


class Heartbeat(Message, frozen=True, tag="heartbeat"):
    """The client lives. Answer: Echo."""


class Propose(Message, frozen=True, tag="propose"):
    """A rank holds items that its cached layout does not describe. Answer: Assigned or Aborted.

    With ``dry`` set nothing is saved: the plan is made ahead of the first save.
    """

    sequence: Sequence
    checkpoint_id: Name
    digest: Name
    plan: bytes
    dry: bool = False


class Sealed(Message, frozen=True, tag="sealed"):
    """A rank's image is complete and will not change. Answers: SlotFreed, and Committed or Aborted.

    The same bytes stand in the slot's control area, so that a seal outlives a trainer that dies before sending.
    """

    sequence: Sequence
    checkpoint_id: Name
    digest: Name
    arena: int
    slot: int
    control_bytes: NBytes
    image_bytes: NBytes
    object_bytes: bytes  # int64 column: true length of each assigned object, in layout order
    plan_s: Seconds
    stage_s: Seconds
    stall_s: Seconds
    overwrite: bool = True
    code_bytes: NBytes = 0  # not 0: a hand-over, whose pickle of so many bytes ends the image's last item
    code_offset: NBytes = 0  # where it begins in the image
    # Not 0: the image came in waves, of which the slot holds the last: these many bytes, from here on. Nobody has seen
    # all of it but the client, which tells the hashes: of each item in layout order, and of the frame.
    wave_bytes: NBytes = 0
    wave_begin: NBytes = 0
    hashes: bytes = b""
    frame_hash: Hash = 0
    user: UserText = ""  # of rank 0: what the user says of the checkpoint, in JSON; stored with it
    keep: Keep | None = None  # of rank 0: what to keep of the folder once this save is committed


class GaveUp(Message, frozen=True, tag="gave_up"):
    """A rank will not stage its part of this save."""

    sequence: Sequence
    checkpoint_id: Name
    error: ErrorReport


class Detach(Message, frozen=True, tag="detach"):
    """The client closes its session; what it sealed is finished."""


# --- message socket, daemon to client ----------------------------------------------------------------------------


class Echo(Message, frozen=True, tag="echo"):
    """The daemon's loop lives."""


class Assigned(Message, frozen=True, tag="assigned"):
    """Which of its proposed items this rank stages and writes (int32 column of positions)."""

    sequence: int
    digest: Name
    assigned: bytes
    job_bytes: NBytes = 0  # size of the images of all ranks


class Progress(Message, frozen=True, tag="progress"):
    """How much of a save is durable, over all ranks."""

    sequence: int
    bytes_done: NBytes
    bytes_total: NBytes


class SlotFreed(Message, frozen=True, tag="slot_freed"):
    """The daemon needs this slot no longer."""

    arena: int
    slot: int


class Committed(Message, frozen=True, tag="committed"):
    """The checkpoint is complete, durable and visible under its id."""

    sequence: int
    save_id: str
    metadata: bytes = b""  # of a hand-over: its pickled Metadata, which the daemon does not look into


class Aborted(Message, frozen=True, tag="aborted"):
    """The save failed on all ranks, for this cause. ``replan``: forget the cached layout."""

    sequence: int
    error: ErrorReport
    replan: bool = False


class Fenced(Message, frozen=True, tag="fenced"):
    """The session is over, or a message could not be taken."""

    error: ErrorReport


# --- worker socket -----------------------------------------------------------------------------------------------


class PlanTask(Message, frozen=True, tag="plan_task"):
    """Make one plan of all ranks' proposals and keep it in ``path``.

    ``fixed``: for each rank the positions it has already staged under an earlier plan, or None. ``digests``: by which
    the ranks know their own plans. Beside ``path`` the worker leaves a :class:`PlanRanks`.
    """

    path: Name
    plans: list[bytes]
    fixed: list[bytes | None]
    digests: list[str]


class PlanDone(Message, frozen=True, tag="plan_done"):
    """Positions of the items that each rank writes, and the size of each rank's image."""

    assigned: list[bytes]
    image_bytes: list[NBytes]


class PlanRanks(msgspec.Struct, frozen=True, array_like=True):
    """What a plan was made of, in a file beside it: each rank's local plan, and the positions that it writes."""

    plans: list[bytes]
    assigned: list[bytes]


class WriteTask(Message, frozen=True, tag="write_task"):
    """Write one rank's image from its slot to ``directory/file`` and make it durable."""

    plan_path: Name
    rank: Rank
    arena_path: Name
    image_offset: NBytes
    image_bytes: NBytes
    object_bytes: bytes
    directory: Name
    file: Name
    threads: Count
    chunk_bytes: NBytes


class WriteProgress(Message, frozen=True, tag="write_progress"):
    """Bytes written so far by the task under way."""

    bytes_done: NBytes


class WriteDone(Message, frozen=True, tag="write_done"):
    """The image is durable. ``hashes``: uint64 column, xxh3-64 of each item in layout order."""

    bytes_written: NBytes
    hashes: bytes
    frame_hash: int  # xxh3-64 of all bytes that are no indexed item's payload
    write_s: Seconds
    fsync_s: Seconds
    direct: bool


class CommitTask(Message, frozen=True, tag="commit_task"):
    """Write index and metadata into ``directory`` and publish it as ``checkpoint_id``."""

    plan_path: Name
    directory: Name
    checkpoint_id: Name
    save_id: Name
    hashes: list[bytes]
    frame_hashes: list[int]
    object_bytes: list[bytes]
    overwrite: bool
    header: dict[str, str]


class CommitDone(Message, frozen=True, tag="commit_done"):
    """The checkpoint is published and durable."""

    bytes_total: NBytes


class StagedHandOver(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where one rank's hand-over lies: its image in an arena, and the pickle in the image."""

    arena_path: Name
    image_offset: NBytes
    image_bytes: NBytes
    code_offset: NBytes
    code_bytes: NBytes


class HandOverTask(Message, frozen=True, tag="hand_over_task"):
    """Save with the planners and writers that the ranks, which are listed in order, have handed over."""

    ranks: list[StagedHandOver]


class HandOverDone(Message, frozen=True, tag="hand_over_done"):
    """The writer has finished the checkpoint. ``metadata``: the pickled Metadata."""

    metadata: bytes


class DiscardTask(Message, frozen=True, tag="discard_task"):
    """Remove the hidden directory of a save that failed."""

    directory: Name


class DiscardDone(Message, frozen=True, tag="discard_done"):
    """The hidden directory is gone."""


class TaskFailed(Message, frozen=True, tag="task_failed"):
    """The task failed for a foreseen reason."""

    error: ErrorReport


AttachRequest = Attach | Resume | OpenArena | OpenCache | OpenRetained | RetainedClosed | Drain
AttachReply = Attached | ArenaOpened | CacheOpened | RetainedOpened | Drained | Refused
CacheMessage = CacheWants | CacheBegun | CacheSkipped | CacheClaim | CacheDone | CacheLeft
ClientMessage = Heartbeat | Propose | Sealed | WaveSealed | Retain | GaveUp | Detach | CacheMessage
DaemonMessage = Echo | Assigned | Progress | SlotFreed | Committed | Aborted | Fenced | CacheAnswer
Task = PlanTask | WriteTask | WriteWaveTask | FinishWavesTask | CommitTask | DiscardTask | HandOverTask | RetainTask
TaskReply = (
    PlanDone
    | WriteProgress
    | WaveWritten
    | WriteDone
    | CommitDone
    | DiscardDone
    | HandOverDone
    | RetainDone
    | TaskFailed
)


class _AttachVersion(msgspec.Struct):
    """The part of :class:`Attach` that no version changes."""

    protocol: int


_encoder = msgspec.msgpack.Encoder()
_attach_version = msgspec.msgpack.Decoder(_AttachVersion)
_attach_request: msgspec.msgpack.Decoder[AttachRequest] = msgspec.msgpack.Decoder(AttachRequest)
_attach_reply: msgspec.msgpack.Decoder[AttachReply] = msgspec.msgpack.Decoder(AttachReply)
_client_message: msgspec.msgpack.Decoder[ClientMessage] = msgspec.msgpack.Decoder(ClientMessage)
_daemon_message: msgspec.msgpack.Decoder[DaemonMessage] = msgspec.msgpack.Decoder(DaemonMessage)
_task: msgspec.msgpack.Decoder[Task] = msgspec.msgpack.Decoder(Task)
_error_report = msgspec.msgpack.Decoder(ErrorReport)
_plan_ranks = msgspec.msgpack.Decoder(PlanRanks)
_task_reply: msgspec.msgpack.Decoder[TaskReply] = msgspec.msgpack.Decoder(TaskReply)


def encode(message: Message | PlanRanks | ErrorReport) -> bytes:
    """Return the wire form of a message, or of what is kept like one."""
    return _encoder.encode(message)


def _decode(decoder: msgspec.msgpack.Decoder[_T], frame: bytes | memoryview) -> _T:
    try:
        return decoder.decode(frame)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise BadMessage(str(error)) from None


def decode_attach_version(frame: bytes) -> int:
    """Return the protocol version of an attach frame of any version. Raises BadMessage."""
    return _decode(_attach_version, frame).protocol


def decode_attach_request(frame: bytes) -> AttachRequest:
    """Raises BadMessage."""
    return _decode(_attach_request, frame)


def decode_attach_reply(frame: bytes) -> AttachReply:
    """Raises BadMessage."""
    return _decode(_attach_reply, frame)


def decode_client_message(frame: bytes | memoryview) -> ClientMessage:
    """Raises BadMessage."""
    return _decode(_client_message, frame)


def decode_daemon_message(frame: bytes | memoryview) -> DaemonMessage:
    """Raises BadMessage."""
    return _decode(_daemon_message, frame)


def decode_plan_ranks(data: bytes) -> PlanRanks:
    """Raises BadMessage."""
    return _decode(_plan_ranks, data)


def decode_error(data: bytes) -> ErrorReport:
    """Raises BadMessage."""
    return _decode(_error_report, data)


def decode_task(frame: bytes) -> Task:
    """Raises BadMessage."""
    return _decode(_task, frame)


def decode_task_reply(frame: bytes) -> TaskReply:
    """Raises BadMessage."""
    return _decode(_task_reply, frame)
