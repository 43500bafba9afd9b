"""What a manager can be told, and what is refused before anything is saved."""

from __future__ import annotations

import dataclasses

import pytest
from support.managed import entry

from ckptd.client import CheckpointManager, ManagerOptions
from ckptd.client.manager.options import info_of
from ckptd.protocol.errors import Unsupported
from ckptd.protocol.retention_messages import Keep


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"every_steps": 0}, "every_steps=0"),
        ({"every_steps": -1}, "every_steps=-1"),
        ({"every_minutes": 0.0}, "every_minutes=0.0"),
        ({"keep_last": 0}, "keep_last=0"),
        ({"keep_best": -1, "keep_last": 1}, "keep_best=-1"),
        ({"keep_best": 1, "keep_last": 1}, "without metric"),
        ({"keep_best": 1, "metric": "loss"}, "without keep_last"),
        ({"keep_every_steps": 5}, "without keep_last"),
        ({"mode": "least"}, "mode='least'"),
        ({"max_consecutive_failures": 3}, "without on_failure"),
    ],
)
def test_what_does_not_go_together_is_refused(options, told):
    with pytest.raises(Unsupported, match=told):
        ManagerOptions(**options)


def test_options_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ManagerOptions().keep_last = 3


def test_what_the_daemon_is_told_to_keep():
    assert ManagerOptions().keep() is None
    options = ManagerOptions(keep_last=3, keep_every_steps=100, keep_best=2, metric="acc", mode="max")
    assert options.keep() == Keep(3, 100, 2, "acc", "max")


def test_what_is_told_of_a_checkpoint_that_says_nothing():
    info = info_of(entry(7, committed_s=5.0, user=None, managed=False))
    assert (info.step, info.metrics, info.metadata, info.committed_unix_s) == (7, {}, None, 5.0)


@pytest.mark.parametrize("options", [{"on_failure": "explode"}, {"on_failure": "raise", "pause_timeout_s": -1}])
def test_a_manager_refuses_what_it_cannot_do(tmp_path, options):
    with pytest.raises(Unsupported):
        CheckpointManager(tmp_path, ManagerOptions(**options))


@pytest.mark.parametrize("root", ["s3://bucket/run", "", "a\0b"])
def test_a_root_is_a_folder(root):
    with pytest.raises(Unsupported):
        CheckpointManager(root)


class TestWithoutADaemon:
    def test_an_empty_folder_has_nothing_to_resume_from(self, tmp_path):
        manager = CheckpointManager(tmp_path / "nothing", ManagerOptions(metric="loss"))
        assert manager.all() == manager.steps() == []
        assert manager.latest() is manager.best() is None
        assert manager.restore({"w": None}) is None

    def test_the_best_needs_a_metric(self, tmp_path):
        manager = CheckpointManager(tmp_path)
        for call in (manager.best, lambda: manager.restore({}, "best")):
            with pytest.raises(Unsupported, match="metric"):
                call()

    @pytest.mark.parametrize("step", ["newest", "7"])
    def test_a_step_is_a_number_or_one_of_two_words(self, tmp_path, step):
        with pytest.raises(Unsupported, match="latest"):
            CheckpointManager(tmp_path).restore({}, step)

    def test_a_save_refuses_what_cannot_be_stored(self, tmp_path):
        manager = CheckpointManager(tmp_path)
        for options in ({"metadata": object()}, {"metrics": {"loss": "high"}}):
            with pytest.raises(Unsupported):
                manager.save(1, {}, **options)
        with pytest.raises(Unsupported, match="step -1"):
            manager.save(-1, {})

    def test_what_is_not_due_is_not_saved(self, tmp_path):
        manager = CheckpointManager(tmp_path, ManagerOptions(every_steps=10))
        assert [step for step in range(25) if manager.should_save(step)] == [0, 10, 20]
        assert manager.save(7, {"w": None}) is None
