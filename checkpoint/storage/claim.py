"""A save that this process has begun as its coordinator, and that it must bring to an end.

There is no call in torch's protocol for a save that fails: the writer is given another save, or forgotten, or the
process ends. Each of them gives up what was claimed.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field

from ckptd.checkpoint.storage.publication import Publication
from ckptd.protocol.errors import CkptdError

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Claim:
    """One save that was begun.

    Attributes:
        token: Its name.
        publication: What is published in the end.
        lock: Descriptor whose lock says that the save is under way; -1 where there is none.
        pid: Who began it: a forked child must not end it.
    """

    token: str
    publication: Publication
    lock: int = -1
    pid: int = field(default_factory=os.getpid)

    def release(self) -> None:
        """End the claim and leave everything as it is."""
        lock, self.lock = self.lock, -1
        if lock >= 0:
            os.close(lock)

    def discard(self) -> None:
        """End the claim and remove what was written."""
        if os.getpid() == self.pid:
            discard_after_failure(self.publication)
        self.release()


def discard_after_failure(publication: Publication) -> None:
    """Remove what a failed save has written. That this fails, too, is logged: its caller has a better error to tell."""
    try:
        publication.discard()
    except (CkptdError, OSError, RuntimeError) as error:
        logger.warning("could not remove what a failed save has written: %s", error)
