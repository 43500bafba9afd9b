"""Which errors may pass if one tries again: the rules of retries, without I/O.

The table errs on the side of failing at once: to try again costs time in which nobody hears of the error.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Final

from ckptd.protocol.errors import CkptdError, SystemCallFailed

# What a device, a network file system or a busy kernel says of this moment. ENOSPC, EDQUOT, EACCES, EPERM, EROFS and
# the like say something of the place: they stay until somebody does something about it.
TRANSIENT_ERRNOS: Final = {
    errno.EIO: "a device or a network file system lost a request",
    errno.EAGAIN: "resources are short for the moment",
    errno.EINTR: "a signal came first",
    errno.EBUSY: "the device or file is in use for the moment",
    errno.ENOBUFS: "buffers are short for the moment",
    errno.ENOMEM: "memory is short for the moment",
    errno.ETIMEDOUT: "a network file system did not answer in time",
    errno.ESTALE: "an NFS server was restarted, or moved a file handle",
    errno.EREMOTEIO: "the remote side of a file system failed",
    errno.ECONNRESET: "the connection to a file server broke",
    errno.ECONNREFUSED: "a file server is being restarted",
    errno.ENETUNREACH: "the network is down for the moment",
    errno.EHOSTUNREACH: "the network is down for the moment",
    errno.ENOTCONN: "the connection to a file server is being opened",
    errno.ESHUTDOWN: "the connection to a file server was shut down",
}


def is_transient(error: CkptdError) -> bool:
    """Return whether the same call may succeed a little later."""
    return isinstance(error, SystemCallFailed) and error.errno in TRANSIENT_ERRNOS


@dataclass(frozen=True)
class Backoff:
    """How often to try, and how long to wait in between.

    Attributes:
        attempts: How often in all.
        first_s: The first wait in seconds; each is twice as long as the one before.
        most_s: The longest wait in seconds.
    """

    attempts: int
    first_s: float
    most_s: float = 30.0

    def wait_s(self, attempt: int) -> float | None:
        """Return how long to wait after an attempt, counted from 1, has failed; None if it was the last."""
        if attempt >= self.attempts:
            return None
        return float(min(self.first_s * 2.0 ** min(attempt - 1, 60), self.most_s))
