"""Events of saves and loads: told to whoever attaches a handler, harmless whatever it does, cheap if there is none."""

from __future__ import annotations

import contextlib
import logging
import re
import timeit
from pathlib import Path

import pytest
import torch
from support.clients import stock_save

from ckptd import client
from ckptd.client.logging_handlers import EVENT_LOGGER_NAME, Phases, add_handler, note, remove_handler
from ckptd.client.saving.futures import SaveFuture
from ckptd.protocol.errors import DiskFull, MissingKeys, UnknownCheckpoint

ROOT = Path(__file__).parents[2]


class Listener(logging.Handler):
    def __init__(self, level=logging.NOTSET):
        super().__init__(level)
        self.records = []

    def emit(self, record):
        self.records.append(record)

    @property
    def events(self):
        return [record.event for record in self.records]

    @property
    def phases(self):
        return [event.phase for event in self.events]


@pytest.fixture
def listen():
    """Attach a listener, and take it out again."""
    names = []

    def attach(name="listener", **options):
        listener = Listener(**options)
        add_handler(name, listener)
        names.append(name)
        return listener

    yield attach
    for name in names:
        remove_handler(name)


def told(phase="stage", **facts):
    note("save", phase, "/runs/7", 3, 0.25, **facts)


def test_an_event_says_what_where_who_and_how_long(listen):
    listener = listen()
    told(nbytes=4096)
    [record] = listener.records
    event = record.event
    assert (event.operation, event.phase, event.checkpoint_id) == ("save", "stage", "/runs/7")
    assert (event.rank, event.seconds, event.bytes, event.error) == (3, 0.25, 4096, None)
    assert event.time == pytest.approx(record.created, abs=60)
    assert record.name == EVENT_LOGGER_NAME
    assert record.getMessage() == "save stage: /runs/7 rank 3 0.250 s 4096 bytes"


def test_a_failure_carries_its_error(listen):
    listener = listen()
    error = DiskFull("/runs", 10, 3)
    told("fail", error=error)
    assert listener.events[0].error is error
    assert listener.records[0].getMessage().endswith(f"rank 3 0.250 s: {error}")


@pytest.mark.parametrize(
    ("phase", "level"), [("stage", "DEBUG"), ("commit", "INFO"), ("finish", "INFO"), ("fail", "ERROR")]
)
def test_levels(listen, phase, level):
    listener = listen()
    told(phase)
    assert listener.records[0].levelname == level


def test_a_handler_hears_from_its_level_on(listen):
    listener = listen(level=logging.INFO)
    for phase in ("plan", "stage", "seal", "commit"):
        told(phase)
    assert listener.phases == ["commit"]


def test_a_handler_of_the_same_name_is_replaced(listen):
    old, other, new = listen("mine"), listen("another"), listen("mine")
    told()
    assert (len(old.records), len(other.records), len(new.records)) == (0, 1, 1)


def test_what_is_removed_hears_nothing_and_may_be_removed_twice(listen):
    listener = listen()
    for _ in range(2):
        remove_handler("listener")
    told()
    assert not listener.records


def test_the_standard_way_of_attaching_works_too(listen):
    listener = Listener()
    logging.getLogger(EVENT_LOGGER_NAME).addHandler(listener)
    try:
        told()
    finally:
        logging.getLogger(EVENT_LOGGER_NAME).removeHandler(listener)
    assert listener.phases == ["stage"]


def test_a_handler_that_fails_harms_nobody(listen, capsys):
    class Broken(logging.Handler):
        def emit(self, record):
            raise RuntimeError("the user's own bug")

    add_handler("broken", Broken())
    try:
        listener = listen()
        told()
    finally:
        remove_handler("broken")
    assert listener.phases == ["stage"]
    assert "the user's own bug" in capsys.readouterr().err


def test_the_root_logger_hears_no_events(listen):
    root = Listener()
    logging.getLogger().addHandler(root)
    try:
        listener = listen()
        told("fail", error=DiskFull("/runs", 10, 3))
    finally:
        logging.getLogger().removeHandler(root)
    assert listener.records
    assert not root.records


def test_nobody_listening_costs_less_than_a_microsecond(monkeypatch):
    monkeypatch.setattr(logging.getLogger(EVENT_LOGGER_NAME), "handlers", [])  # pytest listens, too
    best_s = min(timeit.repeat(told, number=500, repeat=20)) / 500
    assert best_s < 1e-6, f"{best_s * 1e9:.0f} ns"


class TestSaves:
    def test_the_end_of_a_save_is_told_once(self, listen):
        listener = listen()
        future = SaveFuture("/runs/7", lambda: None)
        future.rank = 2
        future.note_staged(100)
        future.note_committed()
        future.note_failed(DiskFull("/runs", 10, 3))
        [event] = listener.events
        assert (event.phase, event.checkpoint_id, event.rank, event.bytes) == ("commit", "/runs/7", 2, 100)
        assert event.seconds >= 0

    def test_so_is_its_failure(self, listen):
        listener = listen()
        future = SaveFuture("/runs/7", lambda: None)
        for _ in range(2):
            future.note_failed(DiskFull("/runs", 10, 3))
        [event] = listener.events
        assert (event.phase, event.rank) == ("fail", 0)
        assert event.error is future.exception()


class TestLoads:
    @pytest.fixture
    def checkpoint(self, tmp_path):
        stock_save({"w": torch.ones(3), "n": 1}, tmp_path / "c")
        return tmp_path / "c"

    def test_each_phase_is_told_in_order(self, listen, checkpoint):
        listener = listen()
        client.load({"w": torch.zeros(3), "n": 0}, checkpoint_id=checkpoint)
        assert listener.phases == ["plan", "read", "finish"]
        assert {event.operation for event in listener.events} == {"load"}
        assert {event.checkpoint_id for event in listener.events} == {str(checkpoint)}
        plan, read, finish = listener.events
        assert finish.seconds >= plan.seconds + read.seconds
        assert read.bytes == finish.bytes >= 12

    def test_a_load_that_does_not_fit_fails_before_it_reads(self, listen, checkpoint):
        listener = listen()
        with pytest.raises(MissingKeys):
            client.load({"x": torch.zeros(3)}, checkpoint_id=checkpoint)
        assert listener.phases == ["fail"]
        assert isinstance(listener.events[0].error, MissingKeys)

    def test_a_checkpoint_that_is_not_there(self, listen, tmp_path):
        listener = listen()
        with pytest.raises(UnknownCheckpoint):
            client.load({"x": torch.zeros(3)}, checkpoint_id=tmp_path / "nowhere")
        assert listener.phases == ["fail"]

    def test_a_load_by_a_planner_of_the_users_own_tells_of_its_end(self, listen, checkpoint):
        class Mine(client.DefaultLoadPlanner):
            def commit_tensor(self, read_item, tensor):
                if self.broken:
                    raise OSError("gone")

        for broken, phase in ((False, "finish"), (True, "fail")):
            listener, planner = listen(), Mine()
            planner.broken = broken
            with contextlib.suppress(client.CheckpointException):
                client.load({"w": torch.zeros(3)}, checkpoint_id=checkpoint, planner=planner)
            assert listener.phases == [phase]
            assert listener.events[0].checkpoint_id == str(checkpoint)

    def test_phases_follow_each_other(self, listen):
        listener = listen()
        phases = Phases("load", "/runs/7")
        for name in ("plan", "read", "finish"):
            phases.end(name)
        plan, read, finish = listener.events
        assert plan.time <= read.time <= finish.time
        assert finish.seconds >= read.seconds + plan.seconds


def test_every_module_logs_under_its_own_name():
    """Never through the root logger: no logging.info(), no basicConfig(), no getLogger() without a name."""
    calls = []
    for folder in ("client", "checkpoint", "staging", "protocol"):
        for file in (ROOT / folder).rglob("*.py"):
            calls += re.findall(r"\blogging\.([a-zA-Z]\w*\(\)?)", file.read_text(encoding="utf-8"))
    assert calls.count("getLogger(") >= 4
    assert set(calls) <= {"getLogger(", "LogRecord("}
