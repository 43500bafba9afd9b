"""Where O_DIRECT cannot be had, workers write through the page cache; the checkpoint is the same."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.clients import assert_holds
from support.nursery import state

CKPTD = str(Path(sys.executable).with_name("ckptd"))


@pytest.mark.parametrize("kind", ["disk", "tmpfs", "overlay"])
def test_a_checkpoint_is_good_on(mounts, daemon, client, tmp_path, kind):
    place = {"disk": lambda: tmp_path, "tmpfs": lambda: mounts.tmpfs(mib=64), "overlay": mounts.overlay}[kind]()
    client.save(state(3), checkpoint_id=place / "a")
    client.save(state(3, 2.0), checkpoint_id=place / "a")  # an exchange of names, where there is one
    assert_holds(place / "a", mib=3, value=2.0)
    assert subprocess.run([CKPTD, "verify", str(place / "a")], timeout=30, check=False).returncode == 0
    assert sorted(path.name for path in (place / "a").iterdir()) == [".ckptd", ".metadata", "__0_0.distcp"]
