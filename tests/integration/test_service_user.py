"""The service of one user, under that user's own systemd; and units out of a wheel."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.mounts import unavailable
from support.systemd_host import ALICE, CKPTD

ROOT = Path(__file__).parents[2]
RUNTIME = f"/run/user/{ALICE}"
ALICES = {"HOME": "/home/alice", "XDG_RUNTIME_DIR": RUNTIME, "USER": "alice"}


@pytest.fixture
def alice(host):
    """A function that runs commands as Alice, whose systemd runs."""
    started = host.call("systemctl", "start", f"user@{ALICE}.service")
    if started.returncode:
        unavailable(f"no user manager here: {started.stderr.strip()}")

    def run(*command):
        done = host.call(*command, uid=ALICE, environment=ALICES)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    yield run
    host.run("systemctl", "stop", f"user@{ALICE}.service")


def show(alice, name):
    return alice("systemctl", "--user", "show", "--value", "-p", name, "ckptd.service").strip()


def test_a_users_own_service(host, alice, host_nursery):
    alice(CKPTD, "install", "--user")
    alice("systemctl", "--user", "start", "ckptd.socket")
    trainer = host_nursery.trainer(
        environment={**ALICES, "CKPTD_EMBEDDED": "0"},
        log="/tmp/trainer-user.log",
        uid=ALICE,
        without=["CKPTD_RUNTIME_DIR", "CKPTD_CONFIG"],
    )
    trainer.do("dcp.save(state(1), checkpoint_id='/home/alice/user/a')")
    status = json.loads(alice(CKPTD, "status", "--json"))
    assert (status["mode"], str(status["pid"])) == ("user", show(alice, "MainPID"))
    assert status["runtime_dir"] == f"{RUNTIME}/ckptd"
    adjusted = [int(host.read(f"/proc/{pid}/oom_score_adj")) for pid in (status["pid"], *status["workers"])]
    trainer.say_goodbye()  # not before: its worker goes with it
    assert adjusted[0] == 100
    assert all(value == 200 for value in adjusted[1:]), "workers go before the daemon"
    alice("systemctl", "--user", "reload", "ckptd.service")
    alice("systemctl", "--user", "stop", "ckptd.socket", "ckptd.service")
    assert show(alice, "Result") == "success"
    alice(CKPTD, "uninstall", "--user")
    assert show(alice, "LoadState") == "not-found"


def test_a_wheel_brings_the_units(tmp_path):
    source = tmp_path / "source"
    unwanted = shutil.ignore_patterns(".git", ".venv", ".*_cache", ".hypothesis", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=unwanted, symlinks=True)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(source)], check=True, timeout=120)
    [wheel] = tmp_path.glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "installed", "zip")
    code = "import ckptd; print(ckptd.__file__); from ckptd.daemon.cli import main; main()"
    ran = subprocess.run(
        [sys.executable, "-c", code, "install", "--root", str(tmp_path / "image")],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert ran.stdout.startswith(str(tmp_path / "installed"))
    installed = {path.name for path in (tmp_path / "image").rglob("*") if path.is_file()}
    assert installed == {"ckptd.service", "ckptd.socket", "ckptd.slice", "ckptd.conf", "ckptd.toml"}
