"""Folders in which a daemon works while one looks: what vanishes meanwhile is not there, and no error."""

from __future__ import annotations

import os
from fnmatch import fnmatch
from pathlib import Path


def below(root, pattern="*"):
    """Return the files and folders anywhere below a folder whose names match; none if there is no such folder."""
    found = []
    for folder, folders, files in os.walk(root):  # unlike rglob it passes over a folder that goes while it is read
        found += [Path(folder, name) for name in (*folders, *files) if fnmatch(name, pattern)]
    return sorted(found)
