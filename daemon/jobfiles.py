"""The files of one job on tmpfs: its arenas and plans, in a directory that only its user can enter."""

from __future__ import annotations

import os
import shutil
import tempfile

from ckptd.daemon.supervisor import Identity
from ckptd.protocol.errors import SystemCallFailed


class JobFiles:
    """A directory that is made when it is first needed.

    Args:
        root: The daemon's own directory on tmpfs.
        identity: Whom the directory belongs to; None is the daemon's own user.
    """

    def __init__(self, root: str, identity: Identity | None) -> None:
        self._root, self._identity = root, identity
        self._directory: str | None = None

    @property
    def owner(self) -> tuple[int, int] | None:
        """Uid and gid that files are given to; None keeps ours."""
        return None if self._identity is None else (self._identity.uid, self._identity.gid)

    def path(self, name: str) -> str:
        """Return the path of a file of this job. Raises SystemCallFailed if the directory cannot be made."""
        if self._directory is None:
            try:
                directory = tempfile.mkdtemp(prefix="job-", dir=self._root)
                if self._identity is not None:
                    os.chown(directory, self._identity.uid, self._identity.gid)
            except OSError as error:
                raise SystemCallFailed("mkdir", self._root, error.errno or 0) from None
            self._directory = directory
        return os.path.join(self._directory, name)

    def remove(self) -> None:
        """Remove the directory and all in it."""
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None
