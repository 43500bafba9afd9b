"""The examples in docs/manager.md run as they stand, one after the other."""

import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "manager.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_examples_run(daemon, trainers, tmp_path):
    trainer = trainers.start()
    trainer.do(
        "import io, contextlib\n"
        "os.chdir(folder)\n"
        "state_dict, steps, printed = state(), 301, io.StringIO()\n"
        "def train(step):\n"
        "    if step == 305: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return abs(step - 100) / 100",
        folder=str(tmp_path),
    )
    assert len(EXAMPLES) == 6
    for example in EXAMPLES:
        trainer.do("with contextlib.redirect_stdout(printed): exec(example)", example=example)
    lines = trainer.get("printed.getvalue()").splitlines()
    assert lines[:2] == ["True", "100 0.0 {'epoch': 0}"]
    assert str(tmp_path / "run" / "step-305") in lines[-1]
    assert trainer.get("(step, handler.requested, manager.steps()[-1])") == (305, True, 305)


def test_the_page_names_every_option_and_call():
    import dataclasses

    from ckptd.client import CheckpointManager, ManagerOptions

    for field in dataclasses.fields(ManagerOptions):
        assert field.name in PAGE
    for name in vars(CheckpointManager):
        assert name.startswith("_") or name in PAGE
