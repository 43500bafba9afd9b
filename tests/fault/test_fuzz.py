"""Damaged input, whatever it is: one of our errors, never another, never much memory, never a long time.

``make fuzz`` gives each reader a hundred times as much, from a seed of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import fuzzing

FIRST = int(os.environ.get("CKPTD_FUZZ_SEED", "0"))
COUNT = int(os.environ.get("CKPTD_FUZZ_COUNT", "1500"))


@pytest.mark.parametrize("target", fuzzing.NAMES)
def test_no_damaged_input_does_harm_to(target):
    done = subprocess.run(
        [sys.executable, fuzzing.__file__, target, str(FIRST), str(COUNT)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=60 + COUNT / 20,
        check=False,
    )
    assert done.returncode == 0, f"it died with {done.returncode}\n{done.stderr[-2000:]}"
    found = json.loads(done.stdout)
    assert found["wrong"] == []
    assert found["answered"] + found["refused"] == COUNT
    assert found["refused"] > COUNT / 5  # or else nothing was damaged
