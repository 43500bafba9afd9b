"""Calls to an object store, made again with back-off when they fail in passing.

This is the border: whatever a store's library raises becomes an error of ours here.
"""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from ckptd.protocol.errors import CkptdError, ObjectStoreFailed

T = TypeVar("T")

# What the same call would meet again. FileNotFoundError is an answer, not a failure, and is handed on.
_PERMANENT: Final = (
    *(PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError),
    *(TypeError, ValueError, NotImplementedError, AttributeError, LookupError, ImportError),
)
_PERMANENT_ERRNOS: Final = {errno.EINVAL, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG}


@dataclass(frozen=True)
class Backoff:
    """How often and after which waits, in seconds, a call is made again; each wait is twice the one before."""

    attempts: int = 5
    first_wait_s: float = 0.1
    sleep: Callable[[float], None] = time.sleep

    def call(self, what: str, url: str, function: Callable[[], T]) -> T:
        """Run ``function`` until it succeeds.

        Args:
            what: Name of the call, for errors.
            url: What it is about.
            function: It may be called several times.

        Raises:
            FileNotFoundError: There is no such object.
            ObjectStoreFailed: It failed for good, or too often.
        """
        for attempt in range(1, self.attempts + 1):
            try:
                return function()
            except (FileNotFoundError, CkptdError):
                raise
            except Exception as error:  # a store's library may raise anything
                if attempt == self.attempts or not is_transient(error):
                    told = f"{type(error).__name__}: {error}" + (f" ({attempt} attempts)" if attempt > 1 else "")
                    raise ObjectStoreFailed(what, url, told) from error
                # Jitter, so that all ranks of a job do not come back at the same moment.
                self.sleep(self.first_wait_s * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
        raise AssertionError("a loop of at least one attempt returns or raises")


def is_transient(error: BaseException) -> bool:
    """Return whether the same call may succeed a moment later."""
    if isinstance(error, _PERMANENT):
        return False
    return not (isinstance(error, OSError) and error.errno in _PERMANENT_ERRNOS)
