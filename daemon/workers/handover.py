"""A worker's part in a hand-over: maps what the ranks staged, and plays DCP's save protocol with the users' objects.

The one module of the daemon that loads torch and unpickles; it runs only in a worker under the user's own uid.
"""

from __future__ import annotations

import mmap
import os
import pickle
from collections.abc import Callable

from ckptd.checkpoint.user_code.handover import UserSave, unpack
from ckptd.checkpoint.user_code.savers import save_all
from ckptd.protocol.errors import BadMessage, CkptdError, SystemCallFailed, UserCodeFailed
from ckptd.protocol.messages import HandOverTask, StagedHandOver


def save_handed_over(task: HandOverTask, *, on_item: Callable[[int], None]) -> bytes:
    """Save what the ranks have handed over and return the pickled metadata.

    Raises:
        UserCodeFailed: The users' code could not be loaded, or failed.
        SystemCallFailed: An arena cannot be mapped.
    """
    saves = [_load(rank, staged) for rank, staged in enumerate(task.ranks)]
    metadata = save_all(saves, on_item=on_item)
    try:
        return pickle.dumps(metadata)
    except Exception as error:
        raise UserCodeFailed(0, "pickling the metadata", repr(error)) from error


def _load(rank: int, staged: StagedHandOver) -> UserSave:
    memory = _map(staged.arena_path)
    image = memory[staged.image_offset : staged.image_offset + staged.image_bytes]
    if image.nbytes != staged.image_bytes:
        raise BadMessage(f"an image of {staged.image_bytes} bytes that its arena does not hold")
    try:
        return unpack(image, image[staged.code_offset : staged.code_offset + staged.code_bytes])
    except CkptdError:
        raise
    except Exception as error:  # an import that fails here, most often
        raise UserCodeFailed(rank, "loading the planner and the writer", repr(error)) from error


def _map(path: str) -> memoryview:
    """Map an arena privately: users' code may write into its tensors and harms nobody else's."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise SystemCallFailed("open", path, error.errno or 0) from None
    try:
        return memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY))
    finally:
        os.close(descriptor)
