"""What `ckptd doctor` says of machines that are ill in one way each."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import sys
from collections import namedtuple
from types import SimpleNamespace

import pytest

from ckptd import __version__
from ckptd.daemon.cli import checks, doctor, rates
from ckptd.daemon.cli.checks import Verdict
from ckptd.daemon.cli.manager import Ran
from ckptd.daemon.settings.config import Config
from ckptd.protocol.errors import BadConfig, DaemonUnavailable, SystemCallFailed

GIB = 1 << 30
Volume = namedtuple("Volume", "f_blocks f_bavail f_frsize")


def only(found):
    [check] = found if isinstance(found, list) else [found]
    assert bool(check.remedy) == (check.verdict is not Verdict.OK), "what is not well has a remedy"
    return check


def named(found, name):
    return only([check for check in found if check.name == name])


@pytest.mark.parametrize(
    ("version", "verdict"),
    [("2.9.0", "ok"), ("2.13.0+cpu", "ok"), ("3.0", "ok"), ("2.8.1", "fail"), ("weird", "fail"), (None, "fail")],
)
def test_torch(monkeypatch, version, verdict):
    def find(name):
        if version is None:
            raise checks.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(checks, "version", find)
    assert named(checks.check_versions(), "torch").verdict == verdict


@pytest.mark.parametrize(
    ("release", "verdict"), [("6.1.0-13-amd64", "ok"), ("5.14.0", "ok"), ("5.4.0-generic", "warn")]
)
def test_the_kernel(monkeypatch, release, verdict):
    monkeypatch.setattr(checks.platform, "release", lambda: release)
    assert named(checks.check_versions(), "kernel").verdict == verdict


@pytest.mark.parametrize(
    ("total", "free", "verdict", "found"),
    [
        (32 * GIB, 30 * GIB, "ok", "30.0 of 32.0 GiB free"),
        (32 * GIB, 1 * GIB, "warn", "1.0 of 32.0 GiB free"),
        (64 << 20, 64 << 20, "warn", "the machine has 64 GiB"),  # a container's default
    ],
)
def test_shared_memory(monkeypatch, tmp_path, total, free, verdict, found):
    monkeypatch.setattr(os, "statvfs", lambda _: Volume(total >> 12, free >> 12, 4096))
    monkeypatch.setattr(os, "sysconf", lambda name: 4096 if name == "SC_PAGE_SIZE" else 64 * GIB >> 12)
    check = only(checks.check_shm(str(tmp_path)))
    assert check.verdict == verdict
    assert found in check.found


def test_shared_memory_that_is_not_there_or_not_ours(monkeypatch, tmp_path):
    assert only(checks.check_shm(str(tmp_path / "gone"))).verdict == "fail"
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "not writable" in only(checks.check_shm(str(tmp_path))).found


@pytest.mark.parametrize(
    ("limits", "verdict", "found"),
    [
        ((resource.RLIM_INFINITY,) * 2, "ok", "unlimited"),
        ((8 << 20, resource.RLIM_INFINITY), "warn", "8 MiB here, unlimited at most"),
        ((8 << 20, 16 << 20), "warn", "8 MiB here, 16 MiB at most"),
    ],
)
def test_locked_memory(monkeypatch, limits, verdict, found):
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    check = only(checks.check_memlock())
    assert (check.verdict, check.found) == (verdict, found)


@pytest.mark.parametrize(
    ("ran", "user", "verdict", "remedy"),
    [
        (Ran((), "b true\n", ""), True, "warn", "`loginctl enable-linger`"),
        (Ran((), "b true\n", ""), False, "warn", "RemoveIPC=no in /etc/systemd/logind.conf, if users log in here"),
        (Ran((), "b false\n", ""), False, "ok", ""),
        (Ran((), "", "busctl is not installed"), False, "ok", ""),
    ],
)
def test_what_logind_does_at_logout(monkeypatch, ran, user, verdict, remedy):
    monkeypatch.setattr(checks, "run", lambda *_: ran)
    check = only(checks.check_logout(user=user))
    assert (check.verdict, check.remedy) == (verdict, remedy)


def test_arenas_of_dead_daemons(tmp_path):
    assert only(checks.check_leftovers(str(tmp_path))).verdict == "ok"
    root = tmp_path / "ckptd-0-0123456789ab"
    root.mkdir()
    lock = os.open(root, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert only(checks.check_leftovers(str(tmp_path))).verdict == "ok"
    os.close(lock)
    check = only(checks.check_leftovers(str(tmp_path)))
    assert (check.verdict, check.remedy) == ("warn", "`ckptd gc` removes them")
    assert only(checks.check_leftovers(str(tmp_path / "gone"))).verdict == "warn"


@pytest.fixture
def small_probe(monkeypatch):
    monkeypatch.setattr(checks, "_PROBE_BYTES", 1 << 20)


def test_a_healthy_folder_is_left_as_it_was(tmp_path, small_probe, monkeypatch):
    monkeypatch.setattr(checks, "_SLOW_BYTES_PER_S", 1.0)
    found = checks.check_folder(str(tmp_path))
    assert [check.name for check in found] == ["room", "clock", "exchange of names", "O_DIRECT", "write rate"]
    assert named(found, "clock").verdict == "ok"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    check = only(checks.check_folder(str(tmp_path / "gone")))
    assert (check.verdict, check.found) == ("fail", f"{tmp_path}/gone: No such file or directory")


@pytest.mark.parametrize(("off_s", "verdict"), [(0.0, "ok"), (10.0, "warn"), (-10.0, "warn"), (3600.0, "fail")])
def test_a_clock_that_differs(tmp_path, monkeypatch, off_s, verdict):
    true_stat = os.stat

    def stat(path, *arguments, **options):
        found = true_stat(path, *arguments, **options)
        return SimpleNamespace(st_mtime=found.st_mtime + off_s) if str(path).endswith("clock") else found

    monkeypatch.setattr(os, "stat", stat)
    assert only(checks._check_clock(str(tmp_path))).verdict == verdict


def test_a_file_system_without_exchange(tmp_path, monkeypatch):
    monkeypatch.setattr("ckptd.checkpoint.system.rename_exchange", lambda *_: False)
    assert only(checks._check_rename(str(tmp_path))).verdict == "warn"


@pytest.mark.parametrize(
    ("answer", "direct", "rate"),
    [((0.001, True), "ok", "ok"), ((0.001, False), "warn", "ok"), ((1.0, True), "ok", "warn")],
)
def test_the_disk(tmp_path, monkeypatch, small_probe, answer, direct, rate):
    monkeypatch.setattr(rates, "write_s", lambda *_: answer)
    found = checks._check_write(str(tmp_path))
    assert named(found, "O_DIRECT").verdict == direct
    assert named(found, "write rate").verdict == rate


def test_a_disk_that_is_full(tmp_path, monkeypatch, small_probe):
    def write_s(path, data):
        raise SystemCallFailed("write", path, 28)

    monkeypatch.setattr(rates, "write_s", write_s)
    check = only(checks._check_write(str(tmp_path)))
    assert check.verdict == "fail"
    assert "No space left on device" in check.found


def test_the_configuration():
    assert only(checks.check_config(Config)).verdict == "ok"

    def load():
        raise BadConfig("/etc/ckptd/ckptd.toml", "unknown key 'x'")

    check = only(checks.check_config(load))
    assert (check.verdict, check.found) == ("fail", "/etc/ckptd/ckptd.toml: unknown key 'x'")


@pytest.mark.parametrize(
    ("config", "allow", "found"),
    [
        (Config(), "127.0.0.0/8 ::1/128", None),
        (Config(http="[::1]:9437"), "127.0.0.0/8 ::1/128", None),
        (Config(http="0.0.0.0:9437"), "127.0.0.0/8 ::1/128", "http = 0.0.0.0:9437, but the unit lets only 127"),
        (Config(user_code=True), "127.0.0.0/8 ::1/128", "user_code, but the unit lets only 127"),
        (Config(http="0.0.0.0:9437"), "0.0.0.0/0 ::/0", None),
        (Config(http="10.0.0.7:9437", user_code=True), "", "http = 10.0.0.7:9437 and user_code, but"),
    ],
)
def test_the_network_that_the_unit_allows(monkeypatch, config, allow, found):
    shown = f"IPAddressAllow={allow}\nIPAddressDeny=::/0 0.0.0.0/0\n"
    monkeypatch.setattr(checks, "run", lambda *_: Ran((), shown, ""))
    result = checks.check_network(lambda: config)
    if found is None:
        assert result == []
    else:
        assert only(result).verdict == "warn"
        assert only(result).found.startswith(found)
    monkeypatch.setattr(checks, "run", lambda *_: Ran((), "", "no systemd"))
    assert checks.check_network(lambda: config) == []


@pytest.mark.parametrize(
    ("more", "verdict", "word"),
    [
        ({}, "ok", "pid 7"),
        ({"version": "0.0.1"}, "warn", "version 0.0.1"),
        ({"takes_saves": False}, "warn", "drained"),
    ],
)
def test_the_running_daemon(monkeypatch, more, verdict, word):
    status = {"pid": 7, "version": __version__, "http": "127.0.0.1:1", "takes_saves": True, **more}
    monkeypatch.setattr(checks, "fetch_status", lambda _: json.dumps(status).encode())
    check = only(checks.check_daemon())
    assert check.verdict == verdict
    assert word in check.found


def test_no_daemon(monkeypatch):
    def fetch(runtime):
        raise DaemonUnavailable("/run/ckptd", "no such file; start one")

    monkeypatch.setattr(checks, "fetch_status", fetch)
    check = only(checks.check_daemon())
    assert (check.verdict, check.found) == ("warn", "no ckptd daemon at /run/ckptd: no such file")


@pytest.fixture
def units(monkeypatch, tmp_path):
    """Answer for systemctl: the facts of both units, with a service file that the test may write."""
    path = tmp_path / "ckptd.service"
    path.write_text(f'[Service]\nExecStart="{sys.executable}" -P -m ckptd.daemon\n')
    facts = {"LoadState": "loaded", "ActiveState": "active", "UnitFileState": "enabled", "Result": "success"}
    ours = Ran((), f"{__version__}\n", "")
    answers = {"facts": {**facts, "FragmentPath": str(path)}, "installed": ours, "error": "", "path": path}

    def run(*command, timeout_s=30.0):
        if command[0] != "systemctl":
            return answers["installed"]
        socket = "ckptd.socket" in command
        shown = {**answers["facts"], "FragmentPath": str(tmp_path / "ckptd.socket") if socket else str(path)}
        return Ran(command, "".join(f"{key}={value}\n" for key, value in shown.items()), answers["error"])

    monkeypatch.setattr(checks, "run", run)
    return answers


def service(found):
    return named(found, "system's ckptd.service")


def test_units_in_order(units):
    assert [check.verdict for check in checks.check_units(user=False)] == ["ok", "ok"]


@pytest.mark.parametrize(
    ("facts", "verdict", "remedy"),
    [
        ({"LoadState": "not-found"}, "warn", "`ckptd install` puts it in place"),
        ({"LoadState": "masked"}, "fail", "`ckptd install` writes it anew"),
        ({"ActiveState": "inactive"}, "warn", "`systemctl enable --now ckptd.service`"),
        ({"ActiveState": "failed", "Result": "exit-code"}, "fail", "see `systemctl status ckptd.service`"),
        ({"ActiveState": "activating"}, "fail", "see `systemctl status ckptd.service`"),
        ({"UnitFileState": "disabled"}, "warn", "`systemctl enable ckptd.service` starts it with the machine"),
    ],
)
def test_units_not_in_order(units, facts, verdict, remedy):
    units["facts"].update(facts)
    check = service(checks.check_units(user=False))
    assert (check.verdict, check.remedy) == (verdict, remedy)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[Service]\n", "has no ExecStart"),
        ("[Service]\nExecStart=/gone/python -m x\n", "runs /gone/python, which is not there or cannot be run"),
    ],
)
def test_a_wrong_unit_is_named(units, text, found):
    units["path"].write_text(text)
    check = service(checks.check_units(user=False))
    assert check.verdict == "fail"
    assert check.found == f"{units['path']}: {found}"


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (Ran((), "", "No module named 'ckptd'"), "which has no ckptd: No module named 'ckptd'"),
        (Ran((), "0.0.1\n", ""), f"runs ckptd 0.0.1 of {sys.executable}; this is {__version__}"),
    ],
)
def test_a_unit_of_another_installation_is_named(units, answer, found):
    units["installed"] = answer
    assert found in service(checks.check_units(user=False)).found


def test_a_users_units_and_no_systemd(units):
    assert [check.name for check in checks.check_units(user=True)] == ["user's ckptd.socket", "user's ckptd.service"]
    units["facts"]["ActiveState"] = "inactive"
    assert "systemctl --user enable" in checks.check_units(user=True)[0].remedy
    units["error"] = "Failed to connect to bus"
    assert only(checks.check_units(user=False)).found == "Failed to connect to bus"


@pytest.mark.parametrize(("failing", "code"), [(False, 0), (True, 1)])
def test_the_report_and_its_exit_status(run_cli, monkeypatch, failing, code):
    found = [checks.ok("a", "well"), checks.warn("b", "hm", "look")]
    found += [checks.fail("c", "ill", "cure it")] if failing else []
    monkeypatch.setattr(doctor, "_checks", lambda *_, **__: found)
    status, out, _ = run_cli("doctor")
    assert status == code
    assert "warn     b      hm -> look" in out
    assert out.splitlines()[-1] == f"1 ok, 1 warnings, {int(failing)} failed"
    status, out, _ = run_cli("doctor", "--json")
    assert status == code
    assert json.loads(out)["good"] is not failing
    assert json.loads(out)["checks"][1] == {"name": "b", "verdict": "warn", "found": "hm", "remedy": "look"}
