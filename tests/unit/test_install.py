"""`ckptd install` and `uninstall` below a root of the test's own; with a real systemd: tests/integration."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from ckptd.daemon.cli import install as module
from ckptd.daemon.cli.manager import Ran
from ckptd.daemon.systemd.units import closed_directories, interpreter_of


@pytest.fixture
def run(run_cli):
    return run_cli


@pytest.fixture(autouse=True)
def commands(monkeypatch):
    """No systemctl runs; what would have run is listed, and fails if it is named."""
    ran, broken = [], {}

    def fake(*command, timeout_s=30.0):
        ran.append(" ".join(command))
        return Ran(command, "", broken.get(command[0], ""))

    monkeypatch.setattr(module, "run", fake)
    monkeypatch.setattr(module, "systemd_version", lambda: 252)
    fake.ran, fake.broken = ran, broken
    return fake


def files_below(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_an_image_gets_all_files_and_no_command_runs(run, tmp_path, commands):
    code, out, _ = run("install", "--root", str(tmp_path))
    assert code == 0
    assert files_below(tmp_path) == [
        "etc/ckptd/ckptd.toml",
        "etc/systemd/system/ckptd.service",
        "etc/systemd/system/ckptd.slice",
        "etc/systemd/system/ckptd.socket",
        "etc/sysusers.d/ckptd.conf",
        "etc/tmpfiles.d/ckptd.conf",
    ]
    assert commands.ran == []
    service = (tmp_path / "etc/systemd/system/ckptd.service").read_text()
    assert interpreter_of(service) == sys.executable
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()} == {0o644}
    assert "next: systemctl enable --now ckptd.socket ckptd.service" in out
    assert run("uninstall", "--root", str(tmp_path))[0] == 0
    assert files_below(tmp_path) == []


def test_a_dry_run_says_it_all_and_does_nothing(run, tmp_path, commands):
    code, out, _ = run("install", "--root", str(tmp_path), "--prefix", "/usr", "--dry-run")
    assert (code, files_below(tmp_path), commands.ran) == (0, [], [])
    assert f"would be written: {tmp_path}/usr/lib/systemd/system/ckptd.service" in out
    run("install", "--root", str(tmp_path))
    before = files_below(tmp_path)
    code, out, _ = run("uninstall", "--root", str(tmp_path), "--dry-run")
    assert (code, files_below(tmp_path)) == (0, before)
    assert f"would be removed: {tmp_path}/etc/systemd/system/ckptd.socket" in out


def test_a_configuration_that_is_there_stays(run, tmp_path):
    config = tmp_path / "etc/ckptd/ckptd.toml"
    config.parent.mkdir(parents=True)
    config.write_text("write_threads = 2\n")
    _, out, _ = run("install", "--root", str(tmp_path))
    assert config.read_text() == "write_threads = 2\n"
    assert f"kept as it is: {config}" in out
    _, out, _ = run("uninstall", "--root", str(tmp_path))
    assert files_below(tmp_path) == ["etc/ckptd/ckptd.toml"]
    assert f"kept as it is: {config}" in out


def test_a_second_install_brings_units_up_to_date(run, tmp_path):
    run("install", "--root", str(tmp_path))
    service = tmp_path / "etc/systemd/system/ckptd.service"
    fresh = service.read_text()
    service.write_text("[Service]\nExecStart=/gone\n")
    run("install", "--root", str(tmp_path))
    assert service.read_text() == fresh


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config"


def test_a_users_service_tells_its_own_manager(run, home, commands):
    code, out, err = run("install", "--user", "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert facts["written"] == [
        f"{home}/systemd/user/ckptd.service",
        f"{home}/systemd/user/ckptd.socket",
        f"{home}/ckptd/ckptd.toml",
    ]
    assert commands.ran == facts["commands"] == ["systemctl --user daemon-reload"]
    assert facts["next"][0] == "loginctl enable-linger"
    commands.ran.clear()
    code, out, _ = run("uninstall", "--user", "--json")
    assert json.loads(out)["removed"] == facts["written"]
    assert commands.ran == [
        "systemctl --user disable --now ckptd.socket ckptd.service",
        "systemctl --user daemon-reload",
    ]
    assert files_below(home) == []
    commands.ran.clear()
    assert run("uninstall", "--user")[:2] == (0, "")
    assert commands.ran == [], "there is nothing to stop"


def test_a_broken_or_missing_unit_is_put_right_to_be_stopped(run, home, commands):
    run("install", "--user")
    (home / "systemd/user/ckptd.service").write_text("[Service")
    (home / "systemd/user/ckptd.socket").unlink()
    commands.ran.clear()
    assert run("uninstall", "--user")[0] == 0
    reload = "systemctl --user daemon-reload"
    assert commands.ran == [reload, "systemctl --user disable --now ckptd.socket ckptd.service", reload]
    assert files_below(home) == []


def test_a_command_that_fails_is_one_line_and_1(run, home, commands):
    commands.broken["systemctl"] = "Failed to connect to bus"
    code, _, err = run("install", "--user")
    assert code == 1
    assert err == (
        "ckptd: `systemctl --user daemon-reload` failed: Failed to connect to bus; run it once that is put right\n"
    )
    assert (home / "systemd/user/ckptd.service").exists()


def test_the_system_needs_root(run, monkeypatch, commands):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for command in ("install", "uninstall"):
        code, out, err = run(command)
        assert (code, out) == (1, "")
        assert err == (
            "ckptd: install: a service of the system needs root; use sudo, or say --user for one of your own\n"
        )
    assert commands.ran == []


def test_an_interpreter_that_users_cannot_run_is_named(run, tmp_path):
    _, _, err = run("install", "--root", str(tmp_path))
    closed = closed_directories([sys.executable, sys.prefix, sys.base_prefix, str(Path(module.__file__).parent)])
    assert (f"{closed[0]} is closed to them" in err or len(closed) > 1) if closed else err == ""


def test_a_place_that_cannot_be_written_is_one_line(run, tmp_path):
    (tmp_path / "etc").write_text("a file")
    code, _, err = run("install", "--root", str(tmp_path))
    assert (code, err.count("\n")) == (1, 1)
    assert "Not a directory" in err or "File exists" in err
    assert files_below(tmp_path) == ["etc"]


@pytest.mark.parametrize("arguments", [("--root", "relative"), ("--prefix", "usr")])
def test_a_relative_place_is_wrong_usage(run, arguments):
    assert run("install", *arguments)[0] == 2
