"""On real directories: whatever is pinned, read, being saved or latest stays, whole; all else goes; nothing is left."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from support.managed import write_managed

from ckptd.checkpoint.folder.locks import reading
from ckptd.checkpoint.folder.pins import pin
from ckptd.checkpoint.folder.removal import retain
from ckptd.protocol.retention_messages import Keep, RetainTask

# A step, and what protects it.
STEPS = st.dictionaries(
    st.integers(0, 9), st.sets(st.sampled_from(["pinned", "read", "saved", "left over"]), max_size=2), max_size=5
)


@settings(max_examples=40, deadline=None)
@given(STEPS, st.integers(1, 3))
def test_what_must_stay_stays_whole_and_the_rest_goes_without_trace(steps, last):
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as readers:
        root = Path(folder)
        files = {}
        for age, (step, facts) in enumerate(sorted(steps.items())):
            path = write_managed(root, step, committed_s=1000 + age)
            if "pinned" in facts:
                pin(str(path))
            if "read" in facts:
                readers.enter_context(reading(str(path)))
            if "left over" in facts:
                write_managed(root, step, name=f".step-{step}.ckptd-removed-0a")
            files[step] = {file.name: file.read_bytes() for file in path.iterdir()}
        busy = [f"step-{step}" for step, facts in steps.items() if "saved" in facts]
        done = retain(RetainTask(str(root), Keep(last), busy))
        protected = {step for step, facts in steps.items() if facts & {"pinned", "read", "saved"}}
        wanted = protected | set(sorted(steps)[-last:])
        assert {path.name for path in root.iterdir()} == {f"step-{step}" for step in wanted}
        for step in wanted:
            assert {file.name: file.read_bytes() for file in (root / f"step-{step}").iterdir()} == files[step]
        assert done.errors == []
        assert set(done.removed) == {f"step-{step}" for step in set(steps) - wanted}
