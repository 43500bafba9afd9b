"""Many saves in a row with kills at random: a short form of `make soak`."""

from __future__ import annotations

import os

from support.soaking import Soak, leftovers

SAVES = int(os.environ.get("CKPTD_SOAK_SAVES", "25"))


def test_a_short_soak_loses_nothing_and_leaves_nothing(runtime, nursery, tmp_path):
    soak = Soak(runtime, nursery, tmp_path / "runs", seed=7)
    figures = soak.run(SAVES)
    soak.close()
    assert figures.saves == SAVES == sum(figures.outcomes.values())
    assert len(figures.events) > 5
    assert leftovers(runtime) == []
