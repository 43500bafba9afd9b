"""The daemon's configuration: one TOML file, read at the start and when SIGHUP says that it is new.

Invariant: a :class:`Config` made by :func:`load_config` is within its bounds; nobody checks them again.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec

from ckptd.protocol.errors import BadConfig
from ckptd.protocol.transient import Backoff

# O_DIRECT needs offset, length and address aligned to the device's logical block size; 4096 covers every NVMe
# format in use. Source: open(2), NOTES, "O_DIRECT".
_BLOCK_BYTES: Final = 4096
_MIB: Final = 1024**2
_DAY_S: Final = 86_400

Threads = Annotated[int, msgspec.Meta(ge=1, le=64)]
Chunk = Annotated[int, msgspec.Meta(ge=_BLOCK_BYTES, le=1024 * _MIB, multiple_of=_BLOCK_BYTES)]
Nice = Annotated[int, msgspec.Meta(ge=0, le=19)]
# The upper bound also keeps out TOML's inf and nan: no wait is without end.
Seconds = Annotated[float, msgspec.Meta(gt=0, le=_DAY_S)]
Retention = Annotated[float, msgspec.Meta(ge=0, le=_DAY_S)]
Directory = Annotated[str, msgspec.Meta(pattern="^/")]
CacheBytes = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
Fraction = Annotated[float, msgspec.Meta(ge=0, lt=1)]
Attempts = Annotated[int, msgspec.Meta(ge=1, le=100)]
File = Annotated[str, msgspec.Meta(pattern="^(/|$)")]
ConnectionCount = Annotated[int, msgspec.Meta(ge=16, le=65_536)]

_ADDRESS: Final = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<name>[^\[\]:/?#@\s]+)):(?P<port>[0-9]{1,5})")

_NO_ADDRESS: Final = "not HOST:PORT; write it as 127.0.0.1:9437 or [::1]:0"


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What can be set in the configuration file; every key may be left out."""

    http: str = "127.0.0.1:9437"
    """HOST:PORT of the HTTP endpoint; port 0 takes any free one. One that other machines can reach needs a token."""

    http_token_file: File = ""
    """Absolute path of a file that holds the token which HTTP requests must show; CKPTD_HTTP_TOKEN goes before it."""

    http_hosts: tuple[str, ...] = ()
    """Names, without ports, under which proxies and scrapers ask for this endpoint besides its address; requests with
    another Host are refused."""

    http_connections: ConnectionCount = 1024
    """HTTP connections that may be open, 16 to 65536; beyond that the one that has been idle longest is cut."""

    workers_per_job: Threads = 2
    """Worker processes of each job, 1 to 64."""

    write_threads: Threads = 4
    """Threads in a worker that write one image, 1 to 64."""

    write_chunk_bytes: Chunk = 8 * _MIB
    """Bytes of one write call; a multiple of 4096, at most 1 GiB."""

    worker_nice: Nice = 19
    """Niceness of the workers, 0 (as the daemon) to 19 (only when nobody else wants the CPU); see nice(2)."""

    heartbeat_s: Seconds = 2.0
    """Seconds between two signs of life on a session."""

    session_timeout_s: Seconds = 60.0
    """Seconds of silence after which a session is lost; more than ``heartbeat_s``."""

    progress_timeout_s: Seconds = 300.0
    """Seconds after which a generation fails that has made no progress."""

    idle_exit_s: Seconds = 300.0
    """Seconds without a session after which an embedded daemon ends; the other modes never end so."""

    stop_timeout_s: Seconds = 60.0
    """Seconds for which a daemon that got SIGTERM goes on writing what is sealed."""

    retain_s: Retention = 600.0
    """Seconds for which the last commit of a job whose trainers have ended is kept in shared memory, from which a
    restarted trainer loads it. It is given up earlier if the memory is needed. 0: nobody loads from shared memory."""

    orphan_timeout_s: Seconds = 3600.0
    """Seconds after which shared memory is reclaimed that no daemon knows and no live process uses."""

    user_code: bool | Literal["auto"] = "auto"
    """Whether users' own planners and storage writers may run in workers, under their uid; auto is true, but false in
    system mode."""

    shm_dir: Directory = "/dev/shm"
    """Absolute path of the tmpfs that holds the arenas."""

    memory_reserve_bytes: CacheBytes = 128 * _MIB
    """Memory that arenas never take: of the machine's free memory, and of the limit of each control group."""

    memory_reserve_fraction: Fraction = 0.02
    """The same as a fraction of the machine's memory, or of the limit; the larger of the two is kept free."""

    node_cache_bytes: CacheBytes = 128 * _MIB
    """Shared memory of each job through which ranks of this node share what they load, while they load it; 0: none."""

    node_cache_wait_s: Seconds = 1.0
    """Seconds for which a load counts with ranks that have not begun theirs; for ranks that lag behind, twice that."""

    work_attempts: Attempts = 3
    """How often the work of dead workers is begun, the first time included, before its generation fails."""

    write_attempts: Attempts = 5
    """How often an image is written, the first time included, if what fails may pass (EIO, ESTALE, ...)."""

    write_retry_s: Seconds = 0.5
    """Seconds before an image is written again after such an error; twice as long each time, at most 30."""

    def __post_init__(self) -> None:
        """Check what no single bound can say; msgspec makes its own error of a ValueError."""
        if _split(self.http) is None:
            raise ValueError(f"http: {self.http!r} is {_NO_ADDRESS}")
        if self.session_timeout_s <= self.heartbeat_s:
            raise ValueError(f"session_timeout_s: must be more than heartbeat_s, {self.heartbeat_s}")

    @property
    def write_backoff(self) -> Backoff:
        """How images are written again."""
        return Backoff(self.write_attempts, self.write_retry_s)


def default_config_path(mode: str) -> str:
    """Return where the file of a daemon that runs in ``mode`` is looked for when CKPTD_CONFIG names none."""
    if mode == "system":
        return "/etc/ckptd/ckptd.toml"
    base = os.environ.get("XDG_CONFIG_HOME", "")
    return os.path.join(base if os.path.isabs(base) else os.path.expanduser("~/.config"), "ckptd", "ckptd.toml")


def load_config(default_path: str = "") -> Config:
    """Return the configuration of the file that CKPTD_CONFIG names, else of ``default_path``, else the defaults.

    Args:
        default_path: A file that need not be there; see :func:`default_config_path`.

    Raises:
        BadConfig: The file cannot be read, is no TOML, or has an unknown key or a value that cannot be.
            The daemon ends: to go on with defaults would hide the mistake.
    """
    named = os.environ.get("CKPTD_CONFIG", "")
    path = named or default_path
    remedy = "or unset CKPTD_CONFIG" if named else "or remove it"
    if not named and not os.path.lexists(path):
        return Config()
    try:
        values = tomllib.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise BadConfig(path, f"{error.strerror}; correct {remedy}") from None
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError
        raise BadConfig(path, f"not a TOML file: {error}; correct it {remedy}") from None
    return _checked(path, values)


def parse_address(address: str) -> tuple[str, int]:
    """Split ``HOST:PORT`` or ``[IPV6]:PORT`` into host, without brackets, and port, 0 to 65535.

    Raises:
        BadConfig: The text is neither. Tell the user, who wrote it.
    """
    parts = _split(address)
    if parts is None:
        raise BadConfig(repr(address), _NO_ADDRESS)
    return parts


def _checked(path: str, values: dict[str, Any]) -> Config:
    known = Config.__struct_fields__
    if unknown := sorted(set(values) - set(known)):
        raise BadConfig(path, f"unknown key {unknown[0]!r}; correct or remove it (keys: {', '.join(known)})")
    try:
        return msgspec.convert(values, Config)
    except msgspec.ValidationError as error:
        what, _, key = str(error).partition(" - at `$.")
        named = f"{key.rstrip('`')}: {what}" if key else what
        raise BadConfig(path, f"{named}; correct it, or leave it out for the default") from None


def _split(address: str) -> tuple[str, int] | None:
    match = _ADDRESS.fullmatch(address)
    if match is None or int(match["port"]) > 65535:
        return None
    return match["v6"] or match["name"], int(match["port"])
