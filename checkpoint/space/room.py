"""Room on the volume of a checkpoint: what is free, and which part of a save has its blocks already.

Looked at by the trainer's process, before a byte is staged: the path is visible there, under the uid that will write.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from ckptd.checkpoint.names import hidden_directory, is_checkpoint_file
from ckptd.checkpoint.space.quota import quota_room
from ckptd.protocol.errors import DiskFull

_STAT_BLOCK_BYTES: Final = 512  # st_blocks counts these whatever the file system: stat(2)
# The clock of files' times lags behind time.time() by a tick of the kernel, on NFS by what the server's clock lags.
_CLOCKS_DIFFER_S: Final = 2.0


@dataclass(frozen=True)
class Claim:
    """What one save wants of a volume.

    Attributes:
        checkpoint_id: Where it will be published.
        marks: What its hidden directory has in its name, incarnation and sequence.
        wanted_bytes: Size of the images of all ranks.
        begun_unix_s: When it began.
    """

    checkpoint_id: str
    marks: str
    wanted_bytes: int
    begun_unix_s: float

    def has_bytes(self) -> int:
        """Return how much of it is on the volume: written, or reserved by the writers."""
        parent, _ = os.path.split(self.checkpoint_id)
        hidden = os.path.basename(hidden_directory(self.checkpoint_id, ""))
        with suppress(OSError):  # a directory that comes or goes while we look has nothing that counts
            names = [name for name in os.listdir(parent) if name.startswith(hidden)]
            folders = [os.path.join(parent, name) for name in names if self.marks in name.removeprefix(hidden)]
            # Under the id itself may be this save, just published, or an older one.
            published_bytes = _blocks_bytes(self.checkpoint_id, since_unix_s=self.begun_unix_s - _CLOCKS_DIFFER_S)
            return published_bytes + sum(_blocks_bytes(folder, since_unix_s=0) for folder in folders)
        return 0


def _blocks_bytes(folder: str, *, since_unix_s: float) -> int:
    """Return the bytes on the volume of a checkpoint's files that were written since then."""
    total = 0
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            status = entry.stat(follow_symlinks=False)
            if is_checkpoint_file(entry.name) and status.st_mtime > since_unix_s:
                total += status.st_blocks * _STAT_BLOCK_BYTES
    return total


@dataclass(frozen=True)
class Room:
    """What is free for a checkpoint.

    Attributes:
        path: The nearest folder that is there.
        device: Which volume it is on.
        free_bytes: What we may still write there.
        rule: Whose quota says so; "" is the volume itself.
    """

    path: str
    device: int
    free_bytes: int
    rule: str = ""


def find_room(checkpoint_id: str) -> Room | None:
    """Return the room on the volume that will hold a checkpoint; None where nobody can tell."""
    path = os.path.dirname(checkpoint_id)
    while True:
        try:
            volume, device = os.statvfs(path), os.stat(path).st_dev
            break
        except (FileNotFoundError, NotADirectoryError):
            if path == os.path.dirname(path):
                return None
            path = os.path.dirname(path)
        except OSError:
            return None  # the writer will meet it, too, and say what it is
    if not volume.f_blocks:
        return None  # a file system in user space that does not know its size
    free_bytes, quota = volume.f_bavail * volume.f_frsize, quota_room(path)
    if quota is not None and quota.free_bytes < free_bytes:
        return Room(path, device, quota.free_bytes, f"quota of {quota.owner}")
    return Room(path, device, free_bytes)


def check_room(claim: Claim, room: Room, others: Sequence[Claim]) -> None:
    """Refuse a save for which there is no room.

    An overwrite keeps the old checkpoint until the new one is there: nothing is subtracted for it.

    Args:
        claim: The save.
        room: As measured just now, before this call.
        others: Saves to the same volume that are not committed yet.

    Raises:
        DiskFull: The volume, or a quota, leaves less than all of them still need; nothing was staged.
    """
    if room.free_bytes >= claim.wanted_bytes + sum(other.wanted_bytes for other in others):
        return  # without a look at what they have already: in a steady state this is all
    needed_bytes = claim.wanted_bytes - claim.has_bytes()  # other ranks may have begun
    promised_bytes = sum(max(0, other.wanted_bytes - other.has_bytes()) for other in others)
    if room.free_bytes < needed_bytes + promised_bytes:
        free_bytes = max(0, room.free_bytes - promised_bytes)
        raise DiskFull(room.path, claim.wanted_bytes, free_bytes, promised_bytes, room.rule)
