"""The caller asked for something that cannot be had as asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ckptd.protocol.errors.base import RequestError


@dataclass(eq=False)
class BadMessage(RequestError):
    """A frame that is not one of our messages."""

    code: ClassVar[str] = "bad_message"
    reason: str

    def __str__(self) -> str:
        return f"not a ckptd message: {self.reason}; is the other side a ckptd of the same version?"


@dataclass(eq=False)
class ProtocolMismatch(RequestError):
    """Client and daemon speak different versions of the protocol."""

    code: ClassVar[str] = "protocol_mismatch"
    client: int
    daemon: int

    def __str__(self) -> str:
        older = "client" if self.client < self.daemon else "daemon"
        versions = f"client speaks protocol {self.client}, daemon speaks {self.daemon}"
        return f"{versions}: upgrade the {older} (pip install --upgrade ckptd) and restart it"


@dataclass(eq=False)
class WrongToken(RequestError):
    """A message carried a token that opens no session."""

    code: ClassVar[str] = "wrong_token"

    def __str__(self) -> str:
        return "the token opens no session of this daemon; call ckptd.client.connect() again"


@dataclass(eq=False)
class Forbidden(RequestError):
    """The peer's uid, which the kernel told us, may not use this daemon."""

    code: ClassVar[str] = "forbidden"
    uid: int
    owner_uid: int

    def __str__(self) -> str:
        return (
            f"uid {self.uid} may not use the daemon of uid {self.owner_uid}; start your own or use the system service"
        )


@dataclass(eq=False)
class RankTaken(RequestError):
    """A live session already holds this rank of the job."""

    code: ClassVar[str] = "rank_taken"
    job: str
    rank: int
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} of job {self.job!r} is held by pid {self.pid}; give this job another name"


@dataclass(eq=False)
class RankMismatch(RequestError):
    """Ranks of one job disagree about what they are doing."""

    code: ClassVar[str] = "rank_mismatch"
    rank: int
    theirs: str
    ours: str

    def __str__(self) -> str:
        return f"rank {self.rank} sent {self.theirs}, but the others {self.ours}; all ranks must make the same calls"


@dataclass(eq=False)
class MultiNode(RequestError):
    """The job's ranks are on several nodes."""

    code: ClassVar[str] = "multi_node"
    world_size: int
    local_ranks: int

    def __str__(self) -> str:
        return (
            f"the job has {self.world_size} ranks, {self.local_ranks} of them on this node: "
            "jobs across nodes are not supported yet; save with one node's ranks or with torch"
        )


@dataclass(eq=False)
class Unsupported(RequestError):
    """An argument or a value that ckptd cannot save or load."""

    code: ClassVar[str] = "unsupported"
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what} is not supported; {self.remedy}"


@dataclass(eq=False)
class BadConfig(RequestError):
    """A configuration file, a variable of the environment or an option that cannot be used as it is."""

    code: ClassVar[str] = "bad_config"
    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(eq=False)
class UnknownCheckpoint(RequestError):
    """There is no checkpoint under this id."""

    code: ClassVar[str] = "unknown_checkpoint"
    path: str

    def __str__(self) -> str:
        return f"no checkpoint at {self.path}: neither .ckptd nor .metadata is there; check the checkpoint id"


@dataclass(eq=False)
class CheckpointExists(RequestError):
    """There is a checkpoint under this id, and it must not be overwritten."""

    code: ClassVar[str] = "checkpoint_exists"
    path: str

    def __str__(self) -> str:
        return f"Checkpoint already exists at {self.path} and overwrite=False; give another id or overwrite=True"


@dataclass(eq=False)
class UnknownExtension(RequestError, ValueError):
    """A checkpoint names an extension that is not registered. A ValueError, too, as stock raises."""

    code: ClassVar[str] = "unknown_extension"
    descriptor: str

    def __str__(self) -> str:
        return f"unknown extension {self.descriptor!r}; register its class with an ExtensionRegistry for the reader"


@dataclass(eq=False)
class OutputExists(RequestError):
    """There is something already where a tool should write."""

    code: ClassVar[str] = "output_exists"
    path: str

    def __str__(self) -> str:
        return f"{self.path} exists already; choose another name, or replace it with --overwrite"


@dataclass(eq=False)
class MissingKeys(RequestError):
    """The state dict asks for keys that the checkpoint does not hold."""

    code: ClassVar[str] = "missing_keys"
    path: str
    count: int
    first: str

    def __str__(self) -> str:
        return (
            f"Missing key in checkpoint state_dict: {self.first} ({self.count} in all, {self.path}); "
            "load with DefaultLoadPlanner(allow_partial_load=True) to skip them"
        )


@dataclass(eq=False)
class Mismatch(RequestError, ValueError):
    """A key's shape or kind in the checkpoint is not what the state dict wants. A ValueError, as torch's own."""

    code: ClassVar[str] = "mismatch"
    key: str
    wanted: str
    stored: str

    def __str__(self) -> str:
        return f"{self.key}: the state dict wants {self.wanted}, the checkpoint holds {self.stored}"


@dataclass(eq=False)
class UserCodeFailed(RequestError):
    """A user's own planner, storage writer or reader raised an error."""

    code: ClassVar[str] = "user_code_failed"
    rank: int
    where: str
    reason: str

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.where} failed: {self.reason}"
