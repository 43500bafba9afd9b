"""Which files make ckptd a service, where they go, and what stands in them. Decides; places nothing.

Invariant: :func:`planned` gives the same files for the same arguments: what was installed can be compared and removed.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from importlib.resources import files
from typing import Final

from ckptd.daemon.settings.sample import sample_config

UNITS: Final = ("ckptd.service", "ckptd.socket", "ckptd.slice")
USER_UNITS: Final = ("ckptd.service", "ckptd.socket")
# The first systemd that knows Type=notify-reload. Source: systemd.service(5).
_NOTIFY_RELOAD_SINCE: Final = 253
# Each user's daemon would want the one default port.
_USER_SETTINGS: Final = {"http": "127.0.0.1:0"}


@dataclass(frozen=True)
class Layout:
    """Where an installation goes.

    Attributes:
        user: Whether it is a service of the user's own, not of the system.
        root: Directory that is taken for ``/``; "" is this machine.
        prefix: Where a package keeps its files, as ``/usr``; "" is the administrator's place, ``/etc``, or the user's.
        config_home: The user's directory of configuration files.
    """

    user: bool
    root: str = ""
    prefix: str = ""
    config_home: str = ""

    def path(self, *parts: str) -> str:
        """Return the path of a file below the root."""
        path = os.path.join("/", *parts)
        return os.path.join(self.root, path.lstrip("/")) if self.root else path

    @property
    def units(self) -> str:
        """Directory of the units."""
        kind = "user" if self.user else "system"
        if self.prefix:
            return self.path(self.prefix, "lib/systemd", kind)
        return self.path(self.config_home, "systemd/user") if self.user else self.path("/etc/systemd/system")

    @property
    def config(self) -> str:
        """Path of the configuration file."""
        return self.path(self.config_home if self.user else "/etc", "ckptd/ckptd.toml")

    def entries(self, kind: str) -> str:
        """Path of the file for ``sysusers.d`` or ``tmpfiles.d``."""
        return self.path(f"{self.prefix}/lib" if self.prefix else "/etc", kind, "ckptd.conf")


@dataclass(frozen=True)
class Planned:
    """One file of an installation. ``keep``: what is there already stays."""

    path: str
    text: str
    keep: bool = False


def planned(layout: Layout, *, python: str, systemd: int) -> list[Planned]:
    """Return the files of an installation.

    Args:
        layout: Where it goes.
        python: Absolute path of the interpreter that the service runs.
        systemd: Version of systemd.
    """
    names = USER_UNITS if layout.user else UNITS
    folder = "user/" if layout.user else ""
    found = [
        Planned(os.path.join(layout.units, name), render(shipped(folder + name), python=python, systemd=systemd))
        for name in names
    ]
    if not layout.user:
        found += [Planned(layout.entries(d), shipped(f"{d}/ckptd.conf")) for d in ("sysusers.d", "tmpfiles.d")]
    settings = sample_config(_USER_SETTINGS) if layout.user else shipped("ckptd.toml")
    return [*found, Planned(layout.config, settings, keep=True)]


def shipped(name: str) -> str:
    """Return the text of a file that comes with the package."""
    return files("ckptd.systemd").joinpath(*name.split("/")).read_text("utf-8")


def render(text: str, *, python: str, systemd: int) -> str:
    """Return a unit for this machine: its interpreter, and the reload that its systemd knows."""
    quoted = python.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    text = text.replace("@PYTHON@", quoted)
    if systemd >= _NOTIFY_RELOAD_SINCE:
        text = re.sub(r"^# `ckptd install` writes notify-reload .*\n", "", text, flags=re.MULTILINE)
        text = re.sub(r"^ExecReload=.*\n", "", text, flags=re.MULTILINE)
        text = re.sub(r"^Type=notify$", "Type=notify-reload", text, flags=re.MULTILINE)
    return text


def interpreter_of(unit: str) -> str | None:
    """Return the interpreter that a unit's ExecStart names, or None if there is no such line."""
    line = re.search(r'^ExecStart=(?:"((?:[^"\\]|\\.)*)"|(\S+))', unit, re.MULTILINE)
    if line is None:
        return None
    quoted = line[1] if line[1] is not None else line[2]
    return re.sub(r"\\(.)", r"\1", quoted.replace("%%", "%").replace("$$", "$"))


def closed_directories(paths: list[str]) -> list[str]:
    """Return the directories above ``paths`` through which not every user may pass, outermost first.

    Workers of a system service run as the trainers' users, with the interpreter and the packages of the daemon.
    """
    closed: list[str] = []
    for path in paths:
        real = os.path.realpath(path)
        parts = real.split("/")
        for depth in range(2, len(parts) + 1):
            folder = "/".join(parts[:depth])
            if os.path.isdir(folder) and not os.stat(folder).st_mode & 0o001 and folder not in closed:
                closed.append(folder)
                break  # what lies below cannot be reached anyway
    return closed
