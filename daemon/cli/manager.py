"""The service manager as commands see it: systemctl and its neighbours, run and understood."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from typing import Final

# Seconds; systemctl answers at once, unless the manager itself hangs.
_ANSWER_S: Final = 30.0


@dataclass(frozen=True)
class Ran:
    """What a command said. ``error``: one line, or "" if all went well."""

    command: tuple[str, ...]
    out: str
    error: str


def run(*command: str, timeout_s: float = _ANSWER_S) -> Ran:
    """Run a command and wait for it; what goes wrong is told, not raised."""
    if shutil.which(command[0]) is None:
        return Ran(command, "", f"{command[0]} is not installed")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return Ran(command, "", f"no answer within {timeout_s:.0f} s")
    except OSError as error:
        return Ran(command, "", str(error))
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return Ran(command, done.stdout, lines[-1] if done.returncode else "")


def systemd_version() -> int:
    """Return the version of systemd here, or 0 where there is none."""
    found = re.match(r"systemd (\d+)", run("systemctl", "--version").out)
    return int(found[1]) if found else 0
