"""A torch.save file in the sharded state of two ranks, by stock's `load` and by ours; what is wrong is told to both."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]
ROWS = torch.arange(15.0).reshape(5, 3)
COLUMNS = torch.arange(28.0).reshape(4, 7)


@pytest.mark.parametrize("library", ["torch.distributed.checkpoint", "ckptd.client"])
def test_each_rank_gets_its_part(library, tmp_path):
    state = {"model": {"rows": ROWS, "columns": COLUMNS, "one_row": ROWS[:1].clone(), "whole": torch.ones(6)}}
    path = tmp_path / "a.pt"
    torch.save({**state, "plain": torch.arange(4.0), "left": "alone"}, path)
    zero, one = run(library, tmp_path / "store", path)
    assert [zero["rows"], one["rows"]] == [ROWS[:3].tolist(), ROWS[3:].tolist()]
    assert [zero["columns"], one["columns"]] == [COLUMNS[:, :4].tolist(), COLUMNS[:, 4:].tolist()]
    assert [zero["one_row"], one["one_row"]] == [ROWS[:1].tolist(), []]
    for told in (zero, one):
        assert told["whole"] == [1.0] * 6
        assert told["plain"] == told["again"] == [0.0, 1.0, 2.0, 3.0]
        assert "Missing key in checkpoint state_dict: nothing" in told["missing"]
        assert "plain: the state dict wants shape (5,), the checkpoint holds shape (4,)" in told["mismatch"]
        assert "plain, which is no tensor," in told["no_tensor"]


def run(library, store, path, world_size=2):
    """Run the ranks; return what each told."""
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    script = str(TESTS / "support" / "broadcast_ranks.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, script, library, str(store), str(rank), str(world_size), str(path)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/",
        )
        for rank in range(world_size)
    ]  # fmt: skip
    try:
        ended = [rank.communicate(timeout=150) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * world_size, ended
    return [json.loads(out.splitlines()[-1]) for out, _ in ended]
