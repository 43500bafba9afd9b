"""Every message between client, daemon and workers; none of them carries payload bytes.

Rule of change: fields are only added, with a default, and :data:`PROTOCOL_VERSION` is raised when an old peer could
misread a message. :class:`Attach` keeps its first field for ever, so that any two versions can refuse each other.

Three conversations:
    attach socket   Attach, Resume, OpenArena, OpenCache -> Attached, ArenaOpened, CacheOpened, Refused   (Unix socket:
                    credentials, descriptors; see :mod:`ckptd.protocol.retained`, too)
    message socket  Heartbeat ... Detach -> Echo ... Fenced                  (ZeroMQ; frames: token, body)
    worker socket   PlanTask ... DiscardTask -> PlanDone ... TaskFailed      (socket pair, length-prefixed)
"""

from __future__ import annotations

from typing import Final, Literal, TypeVar

import msgspec

from ckptd.protocol.errors import BadMessage, ErrorReport
from ckptd.protocol.retained import OpenRetained, RetainedClosed, RetainedOpened
from ckptd.protocol.wire import Count, Message, Name, NBytes, Rank, Seconds

PROTOCOL_VERSION: Final = 2

_T = TypeVar("_T")

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


class OpenCache(Message, frozen=True, tag="open_cache"):
    """Client to daemon: let this rank use the node's cache for a load of so many bytes."""

    wanted_bytes: NBytes


class CacheOpened(Message, frozen=True, tag="cache_opened"):
    """Daemon to client: the descriptor of the cache's segment comes with this frame."""

    frames: Count
    frame_bytes: NBytes


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

    sequence: int
    checkpoint_id: Name
    digest: Name
    plan: bytes
    dry: bool = False


class Sealed(Message, frozen=True, tag="sealed"):
    """A rank's image is complete and will not change. Answers: SlotFreed, and Committed or Aborted.

    The same bytes stand in the slot's control area, so that a seal outlives a trainer that dies before sending.
    """

    sequence: int
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


class GaveUp(Message, frozen=True, tag="gave_up"):
    """A rank will not stage its part of this save."""

    sequence: int
    checkpoint_id: Name
    error: ErrorReport


class CacheWants(Message, frozen=True, tag="cache_wants"):
    """The rank will claim these ranges of a file, each within one frame's length (int64 column: begin, end, ...)."""

    file: Name
    ranges: bytes


class CacheBegun(Message, frozen=True, tag="cache_begun"):
    """All that the rank wants has been said."""


class CacheSkipped(Message, frozen=True, tag="cache_skipped"):
    """The rank has got a range in another way."""

    file: Name
    begin: NBytes
    end: NBytes


class CacheClaim(Message, frozen=True, tag="cache_claim"):
    """The rank needs a range now. Answer: CacheAnswer."""

    number: NBytes
    file: Name
    begin: NBytes
    end: NBytes


class CacheDone(Message, frozen=True, tag="cache_done"):
    """The rank touches the frame that it was told of no more. ``good``: what it was to read is there."""

    number: NBytes
    good: bool = True


class CacheLeft(Message, frozen=True, tag="cache_left"):
    """The rank's load is over."""


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


class CacheAnswer(Message, frozen=True, tag="cache_answer"):
    """What to do about a claim: copy from a frame, read a range into it (reply to both: CacheDone), or read alone."""

    number: NBytes
    verdict: Literal["copy", "read", "alone"]
    frame: NBytes = 0
    begin: NBytes = 0
    end: NBytes = 0


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


AttachRequest = Attach | Resume | OpenArena | OpenCache | OpenRetained | RetainedClosed
AttachReply = Attached | ArenaOpened | CacheOpened | RetainedOpened | Refused
CacheMessage = CacheWants | CacheBegun | CacheSkipped | CacheClaim | CacheDone | CacheLeft
ClientMessage = Heartbeat | Propose | Sealed | GaveUp | Detach | CacheMessage
DaemonMessage = Echo | Assigned | Progress | SlotFreed | Committed | Aborted | Fenced | CacheAnswer
Task = PlanTask | WriteTask | CommitTask | DiscardTask | HandOverTask
TaskReply = PlanDone | WriteProgress | WriteDone | CommitDone | DiscardDone | HandOverDone | TaskFailed


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
