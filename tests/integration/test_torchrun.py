"""A job as people start it: torchrun, gloo, DTensor, and no daemon there before."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from support.clients import stock_load

TESTS = Path(__file__).parents[1]


def test_torchrun_with_gloo_and_an_embedded_daemon(runtime, tmp_path):
    environment = {**os.environ, **runtime.environment, "CKPTD_CONFIG": runtime.configure()}
    environment |= {"CKPTD_EMBEDDED": "1", "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    script = str(TESTS / "support" / "torchrun_trainer.py")
    done = subprocess.run(
        [*command, script, str(tmp_path / "a")],
        env=environment, capture_output=True, text=True, timeout=120, check=False, cwd="/",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("committed") == 2
    assert len(list((tmp_path / "a").glob("*.distcp"))) == 2
    found = {"shard": torch.zeros(8, 3), "replicated": torch.zeros(1 << 18), "step": 0}
    stock_load(found, tmp_path / "a")
    assert torch.equal(found["shard"], torch.arange(24.0).reshape(8, 3))
    assert torch.equal(found["replicated"], torch.ones(1 << 18))
    assert found["step"] == 2
