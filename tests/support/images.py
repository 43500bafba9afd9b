"""Memory that a file can be written from with O_DIRECT, and whether the file system takes that."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import numpy as np


def aligned(data: bytes) -> memoryview:
    """Return a copy of some bytes that begins on a page; empty bytes are copied, too."""
    if not data:
        return memoryview(b"")
    memory = mmap.mmap(-1, len(data))
    memory[:] = data
    return memoryview(memory)


def random_bytes(nbytes: int, *, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8).tobytes()


def takes_direct(folder: Path) -> bool:
    """Return whether files in a folder can be opened with O_DIRECT."""
    try:
        os.close(os.open(folder / "probe", os.O_RDWR | os.O_CREAT | os.O_DIRECT))
    except OSError as error:
        assert error.errno == errno.EINVAL
        return False
    finally:
        (folder / "probe").unlink(missing_ok=True)
    return True
