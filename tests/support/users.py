"""Processes of another user, where the interpreter itself lies in a directory that only root can enter."""

from __future__ import annotations

import os
import sys
from pathlib import Path

NOBODY = 65534

# Covers the closed directory with an empty one, in which only the interpreter's tree is mounted again.
_OPEN = """
set -e
mount --make-rprivate /
mkdir -p "$2"
mount --bind "$1" "$2"
mount -t tmpfs -o mode=755 ckptd-test "$3"
mkdir -p "$1"
mount --bind "$2" "$1"
shift 3
exec "$@"
"""


def open_interpreter(directory):
    """Return the words before a command that make it run where every user can start this interpreter.

    Args:
        directory: A place for a mount point; the mounts are seen by that command and its children alone.
    """
    prefix = Path(sys.base_prefix).resolve()
    closed = [parent for parent in [*reversed(prefix.parents), prefix] if not os.stat(parent).st_mode & 0o001]
    if not closed:
        return []
    # What lies above the interpreter in the closed directory stays closed: nothing of it is mounted again.
    return ["unshare", "--mount", "sh", "-c", _OPEN, "sh", str(prefix), str(Path(directory, "base")), str(closed[0])]
