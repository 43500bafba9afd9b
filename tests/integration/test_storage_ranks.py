"""Several gloo processes: stock's `save`, `async_save` and `load` with our back-ends, and with one rank failing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RANKS = 3
SCRIPT = Path(__file__).parents[1] / "support" / "storage_ranks.py"
# Three processes that import torch on a busy machine of two cores.
DEADLINE_S = 240


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Run all ranks once; what they have seen and left behind is looked at by the tests."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "saved").mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(SCRIPT)]
    with open(folder / "log", "w", encoding="utf-8") as log:
        ranks = [
            subprocess.Popen([*command, str(rank), str(RANKS), str(folder)], env=environment, stdout=log, stderr=log)
            for rank in range(RANKS)
        ]
        try:
            codes = [rank.wait(DEADLINE_S) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    assert codes == [0] * RANKS, (folder / "log").read_text()
    return folder


@pytest.fixture
def seen(folder):
    return [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("back_end", ["files", "objects"])
@pytest.mark.parametrize("what", ["ours to ours", "ours to stock", "overwritten", "async_save"])
def test_all_ranks_load_what_all_ranks_saved(seen, back_end, what):
    assert [mine[f"{back_end}: {what}"] for mine in seen] == [True] * RANKS


def test_ours_reads_what_stocks_ranks_saved(seen):
    assert [mine["files: stock to ours"] for mine in seen] == [True] * RANKS


def test_ranks_may_save_apart(seen):
    assert [mine["files: ranks apart"] for mine in seen] == [True] * RANKS


def test_one_rank_fails_and_all_are_told_why(seen):
    for mine in seen:
        assert any("__1_0.distcp: No space left on device" in cause for cause in mine["one rank fails"])


def test_the_checkpoint_before_it_stands(seen):
    assert [mine["and the old checkpoint stands"] for mine in seen] == [True] * RANKS


def test_nothing_else_stays_behind(folder):
    assert sorted(os.listdir(folder / "saved")) == ["apart", "files", "objects", "stock"]
    assert sorted(os.listdir(folder / "saved" / "files")) == [
        ".ckptd",
        ".metadata",
        *(f"__{r}_0.distcp" for r in range(RANKS)),
    ]
    assert len([name for name in os.listdir(folder / "saved" / "objects") if name.endswith(".distcp")]) == RANKS
