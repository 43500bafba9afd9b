"""What `ckptd doctor` looks at: each check returns what it found, a verdict, and what to do."""

from __future__ import annotations

import os
import platform
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Final

import msgspec

from ckptd import __version__
from ckptd.daemon.cli.manager import run
from ckptd.daemon.cli.status import daemons_runtime_dir, fetch_status
from ckptd.protocol.errors import CkptdError

if TYPE_CHECKING:
    from ckptd.daemon.settings.config import Config

_GIB: Final = 1 << 30
_TORCH: Final = (2, 9)
# MADV_POPULATE_WRITE touches arenas in parallel; before it, one page after the other: Linux 5.14.
_KERNEL: Final = (5, 14)
_PROBE_BYTES: Final = 64 << 20
# Below this a disk is slower than one spinning plate; saves then take minutes.
_SLOW_BYTES_PER_S: Final = 100e6
_CLOCK_WARN_S: Final = 2.0
_CLOCK_FAIL_S: Final = 60.0
_ROOM_WARN: Final = 0.10
_SHM_SHARE: Final = 0.25


class Verdict(StrEnum):
    """How a check came out."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. ``remedy``: what to do, empty where all is well."""

    name: str
    verdict: Verdict
    found: str
    remedy: str = ""


def ok(name: str, found: str) -> Check:
    """Return a check that came out well."""
    return Check(name, Verdict.OK, found)


def warn(name: str, found: str, remedy: str) -> Check:
    """Return a check that found something to look at."""
    return Check(name, Verdict.WARN, found, remedy)


def fail(name: str, found: str, remedy: str) -> Check:
    """Return a check that found what must be put right."""
    return Check(name, Verdict.FAIL, found, remedy)


# --- this machine ------------------------------------------------------------------------------------------------


def check_versions() -> list[Check]:
    """Python, torch and the kernel."""
    kernel = platform.release()
    checks = [ok("python", f"{platform.python_version()}, {sys.executable}"), _check_torch()]
    if _numbers(kernel) < _KERNEL:
        return [*checks, warn("kernel", kernel, "5.14 or later touches staging memory in parallel")]
    return [*checks, ok("kernel", kernel)]


def _check_torch() -> Check:
    try:
        found = version("torch")
    except PackageNotFoundError:
        return fail("torch", "not installed", "pip install torch: the daemon needs none, trainers do")
    if _numbers(found) < _TORCH:
        return fail("torch", found, "2.9 or later is supported")
    return ok("torch", found)


def _numbers(text: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def check_shm(shm_dir: str) -> Check:
    """The tmpfs of arenas: there, large enough, and with room."""
    try:
        volume = os.statvfs(shm_dir)
    except OSError as error:
        return fail("shared memory", f"{shm_dir}: {error.strerror}", "mount a tmpfs there, or set shm_dir")
    total, free = volume.f_blocks * volume.f_frsize, volume.f_bavail * volume.f_frsize
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = f"{shm_dir}: {free / _GIB:.1f} of {total / _GIB:.1f} GiB free"
    if not os.access(shm_dir, os.W_OK):
        return fail("shared memory", f"{found}, not writable", "it must be writable for the daemon's user")
    if total < memory * _SHM_SHARE:
        remedy = f"two slots of each rank's state must fit: mount -o remount,size=50% {shm_dir}"
        return warn("shared memory", f"{found}; the machine has {memory / _GIB:.0f} GiB", remedy)
    if free < total * _ROOM_WARN:
        return warn("shared memory", found, "`ckptd gc` removes what dead daemons left; others may use it, too")
    return ok("shared memory", found)


def check_memlock() -> Check:
    """How much memory a trainer may pin."""
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return ok("locked memory", "unlimited")
    most = "unlimited" if hard == resource.RLIM_INFINITY else f"{hard >> 20} MiB"
    remedy = "only GPU trainers need more: LimitMEMLOCK=infinity in their unit, or memlock in limits.conf"
    return warn("locked memory", f"{soft >> 20} MiB here, {most} at most", remedy)


def check_logout(*, user: bool) -> Check:
    """Whether logind removes a user's shared memory, and with it the arenas, when that user's last session ends."""
    name = "shared memory at logout"
    command = (
        "busctl get-property org.freedesktop.login1 /org/freedesktop/login1 org.freedesktop.login1.Manager RemoveIPC"
    )
    ran = run(*command.split())
    if ran.error:
        return ok(name, "no logind here")
    if ran.out.split() != ["b", "true"]:
        return ok(name, "kept")
    remedy = "`loginctl enable-linger`" if user else "RemoveIPC=no in /etc/systemd/logind.conf, if users log in here"
    found = "logind removes it when a user's last session ends, and saves in flight with it"
    return warn(name, found, remedy)


def check_leftovers(shm_dir: str) -> Check:
    """Arenas of daemons that have died."""
    from ckptd.daemon.cli.leftovers import arena_directories

    try:
        dead = [arena for arena in arena_directories(shm_dir) if not (arena.live or arena.waiting)]
    except CkptdError as error:
        return warn("leftovers", str(error), "check the directory")
    if dead:
        nbytes = sum(arena.nbytes for arena in dead)
        return warn("leftovers", f"arenas of {len(dead)} dead daemons, {nbytes} bytes", "`ckptd gc` removes them")
    return ok("leftovers", "no arenas of dead daemons")


# --- where checkpoints go ----------------------------------------------------------------------------------------


def check_folder(folder: str) -> list[Check]:
    """Whether a folder is fit for checkpoints, tried out in a directory that is removed again."""
    try:
        with tempfile.TemporaryDirectory(prefix=".ckptd-doctor-", dir=folder) as made:
            return [_check_room(folder), _check_clock(made), _check_rename(made), *_check_write(made)]
    except OSError as error:
        return [fail("folder", f"{folder}: {error.strerror}", "name a folder in which you can write")]


def _check_room(folder: str) -> Check:
    volume = os.statvfs(folder)
    total, free = volume.f_blocks * volume.f_frsize, volume.f_bavail * volume.f_frsize
    found = f"{folder}: {free / _GIB:.1f} of {total / _GIB:.1f} GiB free"
    if free < total * _ROOM_WARN:
        return warn("room", found, "delete old checkpoints; a save needs room for a whole new one")
    return ok("room", found)


def _check_clock(made: str) -> Check:
    """Compare our clock with that of the file system, which on a network is another machine's."""
    path = os.path.join(made, "clock")
    before = time.time()
    with open(path, "wb"):
        pass
    after, theirs = time.time(), os.stat(path).st_mtime
    # A file system's clock may be one tick of the kernel behind: 10 ms at most.
    off_s = max(before - theirs, theirs - after, 0.0)
    found = f"the file system's is {off_s:.1f} s off"
    if off_s > _CLOCK_FAIL_S:
        return fail("clock", found, "set both by NTP: ages of checkpoints and locks would be wrong")
    if off_s > _CLOCK_WARN_S:
        return warn("clock", found, "set both by NTP")
    return ok("clock", "as the file system's")


def _check_rename(made: str) -> Check:
    from ckptd.checkpoint.system import rename_exchange

    one, other = os.path.join(made, "one"), os.path.join(made, "other")
    os.mkdir(one)
    os.mkdir(other)
    if rename_exchange(one, other):
        return ok("exchange of names", "supported")
    remedy = "for a moment a checkpoint that is replaced has no name; give each save a new name"
    return warn("exchange of names", "not supported by this file system", remedy)


def _check_write(made: str) -> list[Check]:
    from ckptd.daemon.cli import rates

    path = os.path.join(made, "write")
    data = rates.anonymous_memory(_PROBE_BYTES)
    try:
        seconds, direct = rates.write_s(path, data)
    except CkptdError as error:
        return [fail("write", str(error), "the disk, or its quota, is full or ill")]
    finally:
        data.close()
    rate = _PROBE_BYTES / seconds
    found = f"{rate / 1e9:.2f} GB/s, {_PROBE_BYTES >> 20} MiB made durable in {seconds:.2f} s"
    if direct:
        way = ok("O_DIRECT", "supported")
    else:
        way = warn("O_DIRECT", "not supported by this file system", "saves go through the page cache: more CPU, slower")
    if rate < _SLOW_BYTES_PER_S:
        return [way, warn("write rate", found, "saves will take long; use a faster disk, or save less often")]
    return [way, ok("write rate", found)]


# --- the daemon --------------------------------------------------------------------------------------------------


def check_config(load: Callable[[], Config]) -> Check:
    """Whether the configuration can be used."""
    try:
        load()
    except CkptdError as error:
        return fail("configuration", str(error), "a daemon that starts now ends at once")
    return ok("configuration", "can be used")


def check_network(load: Callable[[], Config]) -> list[Check]:
    """Whether the system's unit lets the daemon have the network that its configuration needs."""
    from ckptd.daemon.settings.config import parse_address

    try:
        config = load()
    except CkptdError:
        return []  # a check of its own
    host = parse_address(config.http)[0]
    needs = [f"http = {config.http}"] if host != "localhost" and not host.startswith("127.") and host != "::1" else []
    needs += ["user_code"] if config.user_code is True else []
    shown = run("systemctl", "show", "ckptd.service", "-p", "IPAddressAllow,IPAddressDeny")
    facts = dict(line.split("=", 1) for line in shown.out.splitlines() if "=" in line)
    everywhere = {"0.0.0.0/0", "::/0"}
    denied = everywhere <= set(facts.get("IPAddressDeny", "").split())
    if not needs or not denied or everywhere <= set(facts.get("IPAddressAllow", "").split()):
        return []
    found = f"{' and '.join(needs)}, but the unit lets only {facts['IPAddressAllow']} through"
    remedy = "`systemctl edit ckptd`: [Service] and IPAddressAllow=any, or the networks that shall reach it"
    return [warn("network", found, remedy)]


def check_daemon() -> Check:
    """Whether a daemon answers."""
    runtime = daemons_runtime_dir()
    try:
        status: dict[str, Any] = msgspec.json.decode(fetch_status(runtime))
    except (CkptdError, msgspec.DecodeError) as error:
        remedy = "start the service; where there is none, each job's first save starts a private one"
        return warn("daemon", str(error).partition(";")[0], remedy)
    found = f"pid {status['pid']}, version {status['version']}, http://{status['http']}"
    if status["version"] != __version__:
        return warn("daemon", found, f"this is {__version__}: `ckptd drain`, then restart the daemon")
    if not status.get("takes_saves", True):
        return warn("daemon", f"{found}, drained", "it takes nothing new until it is restarted")
    return ok("daemon", found)


def check_units(*, user: bool) -> list[Check]:
    """Whether the units are installed, as this version has them, and active."""
    scope = ["--user"] if user else []
    whose = "user" if user else "system"
    manager = " ".join(["systemctl", *scope])
    install = "ckptd install --user" if user else "ckptd install"
    checks = []
    for unit in ("ckptd.socket", "ckptd.service"):
        name = f"{whose}'s {unit}"
        shown = run("systemctl", *scope, "show", unit, "-p", "LoadState,ActiveState,UnitFileState,FragmentPath,Result")
        if shown.error:
            return [warn(f"{whose}'s units", shown.error, "without systemd run `ckptd serve` by other means")]
        facts = dict(line.split("=", 1) for line in shown.out.splitlines() if "=" in line)
        if facts["LoadState"] == "not-found":
            checks.append(warn(name, "missing", f"`{install}` puts it in place"))
        else:
            checks.append(_check_unit(unit, facts, manager=manager, install=install, name=name))
    return checks


def _check_unit(unit: str, facts: dict[str, str], *, name: str, manager: str, install: str) -> Check:
    path = facts["FragmentPath"]
    where = f"{path}, {facts['UnitFileState']}, {facts['ActiveState']}"
    wrong = _what_is_wrong(path, facts["LoadState"])
    if wrong:
        return fail(name, f"{path}: {wrong}", f"`{install}` writes it anew")
    if facts["ActiveState"] == "failed" or facts["ActiveState"] == "activating":
        return fail(name, f"{where} ({facts['Result']})", f"see `{manager} status {unit}`")
    if facts["ActiveState"] != "active":
        return warn(name, where, f"`{manager} enable --now {unit}`")
    if facts["UnitFileState"] != "enabled":
        return warn(name, where, f"`{manager} enable {unit}` starts it with the machine")
    return ok(name, where)


def _what_is_wrong(path: str, state: str) -> str:
    """Return what is wrong with a unit's file, or ""."""
    from ckptd.daemon.systemd.units import interpreter_of

    if state != "loaded":
        return f"systemd cannot use it ({state})"
    if path.endswith(".socket"):
        return ""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            interpreter = interpreter_of(file.read())
    except OSError as error:
        return error.strerror or "cannot be read"
    if interpreter is None:
        return "has no ExecStart"
    if not os.access(interpreter, os.X_OK):
        return f"runs {interpreter}, which is not there or cannot be run"
    installed = run(interpreter, "-P", "-c", "import ckptd; print(ckptd.__version__)")
    if installed.error:
        return f"runs {interpreter}, which has no ckptd: {installed.error}"
    if installed.out.strip() != __version__:
        return f"runs ckptd {installed.out.strip()} of {interpreter}; this is {__version__}"
    return ""
