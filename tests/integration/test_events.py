"""What is told of a save while a real daemon makes it durable, and how its failure is caught."""

import logging
import threading

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException as TorchCheckpointException

from ckptd.client import logging_handlers


class Listener(logging.Handler):
    def __init__(self):
        super().__init__()
        self.events = []
        self.ended = threading.Event()

    def emit(self, record):
        self.events.append(record.event)
        if record.event.phase in {"commit", "fail"}:
            self.ended.set()  # which is told just after the future is done


@pytest.fixture
def listener():
    listener = Listener()
    logging_handlers.add_handler("test", listener)
    yield listener
    logging_handlers.remove_handler("test")


def test_a_save_tells_of_each_phase(daemon, client, listener, tmp_path):
    future = client.async_save({"w": torch.ones(1000)}, checkpoint_id=tmp_path / "a")
    future.result(60)
    assert listener.ended.wait(60)
    phases = [event.phase for event in listener.events]
    assert sorted(phases) == ["commit", "plan", "seal", "stage"]
    assert phases[:2] == ["plan", "stage"]  # the news of the commit may overtake the word of the seal
    told = {event.phase: event for event in listener.events}
    assert {event.checkpoint_id for event in told.values()} == {str(tmp_path / "a")}
    assert {event.rank for event in told.values()} == {0}
    assert told["stage"].bytes >= 4000
    assert told["commit"].seconds >= told["plan"].seconds + told["stage"].seconds


def test_a_save_that_cannot_be_written_is_every_librarys_failure(daemon, client, listener, tmp_path):
    (tmp_path / "file").write_text("in the way")
    future = client.async_save({"w": torch.ones(10)}, checkpoint_id=tmp_path / "file" / "a")
    error = future.exception(60)
    assert isinstance(error, TorchCheckpointException)
    assert isinstance(error, client.CheckpointException)
    assert isinstance(error, client.CkptdError)
    assert list(error.failures) == [0]
    assert "\n" not in str(error)
    assert listener.ended.wait(60)
    assert [event.error for event in listener.events if event.phase == "fail"] == [error]
    with pytest.raises(TorchCheckpointException):
        client.save({"w": torch.ones(10)}, checkpoint_id=tmp_path / "file" / "a")
