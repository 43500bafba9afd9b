"""A process dies at a named point if the environment says so, and nowhere else."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ckptd.protocol.crash_points import VARIABLE, CrashPoint, reach

CODE = """
from ckptd.protocol.crash_points import CrashPoint, reach
reach(CrashPoint.DAEMON_PLANNED)
print("between", flush=True)
reach(CrashPoint.DAEMON_WRITTEN)
print("after", flush=True)
"""


def run(**environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CODE]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)


def test_nothing_happens_unless_it_is_asked_for():
    assert run().stdout.split() == ["between", "after"]


def test_the_process_dies_at_the_point_that_is_named():
    died = run(**{VARIABLE: "daemon.written"})
    assert (died.returncode, died.stdout.split()) == (-9, ["between"])


def test_with_a_mark_only_the_first_one_dies(tmp_path):
    where = {VARIABLE: f"daemon.planned@{tmp_path / 'mark'}"}
    assert run(**where).returncode == -9
    assert (tmp_path / "mark").exists()
    assert run(**where).returncode == 0


@pytest.mark.parametrize("point", CrashPoint)
def test_every_point_names_its_process_and_can_be_passed(point):
    assert point.partition(".")[0] in {"client", "daemon", "worker"}
    reach(point)
