"""The daemon under a service manager: what it says, when it falls silent, what a reload does."""

from __future__ import annotations

import asyncio
import logging
import os

import pytest
from support.managers import manager_at
from support.waiting import PATIENCE_S

from ckptd.daemon.settings.config import Config
from ckptd.daemon.systemd.managed import Managed, describe_work, log_formatter, on_hangup

SAVE = {"state": "committed", "bytes_done": 10, "bytes_total": 10, "error": None, "started_unix_s": 1.0}


def job(*saves, ranks=1):
    return {"sessions": [{}] * ranks, "generations": [{**SAVE, **save} for save in saves]}


@pytest.mark.parametrize(
    ("jobs", "text"),
    [
        ([], "no jobs"),
        ([job(ranks=0)], "no jobs"),
        ([job()], "1 job with 1 rank"),
        ([job(ranks=2), job(ranks=1)], "2 jobs with 3 ranks"),
        (
            [job({}, {"state": "staged", "bytes_done": 5}), job({"state": "committing"})],
            "2 jobs with 2 ranks; saving 2 checkpoints, 75 %",
        ),
        ([job({"state": "scheduled", "bytes_done": 0, "bytes_total": 0})], "1 job with 1 rank; saving 1 checkpoint"),
        ([job({"error": "full", "state": "failed"})], "1 job with 1 rank; the last save failed"),
        ([job({"error": "full", "state": "failed"}, {"started_unix_s": 2.0})], "1 job with 1 rank"),
    ],
)
def test_the_work_in_one_line(jobs, text):
    assert describe_work(jobs) == text


@pytest.fixture
def manager(tmp_path, monkeypatch):
    address = tmp_path / "notify"
    monkeypatch.setenv("NOTIFY_SOCKET", str(address))
    monkeypatch.setenv("WATCHDOG_USEC", "30000")
    monkeypatch.setenv("CKPTD_CONFIG", str(tmp_path / "ckptd.toml"))
    with manager_at(address) as manager:
        yield manager


def managed(config=None):
    return Managed(config or Config(), "user", lambda: {"jobs": []})


def watched(probed, until):
    """Watch ``probed`` until the coroutine has ended, and return what that returned."""

    async def run():
        task = asyncio.create_task(managed().watch(probed))
        try:
            return await until
        finally:
            task.cancel()

    return asyncio.run(run())


class Probed:
    """A message socket that answers, or not; and counts how often it was asked."""

    def __init__(self, answer):
        self._answer, self.asked = answer, 0

    async def answers(self, *, timeout_s):
        assert 0 < timeout_s <= 1
        self.asked += 1
        return self._answer

    async def wait_asked(self, times):
        """Wait until it was asked so often."""
        async with asyncio.timeout(PATIENCE_S):
            while self.asked < times:
                await asyncio.sleep(0.001)


def test_signs_of_life_come_while_the_message_socket_answers(manager):
    seen = watched(Probed(True), manager.hear_until("WATCHDOG=1", "WATCHDOG=1", "WATCHDOG=1"))
    assert seen.count("STATUS=no jobs") == 1


def test_a_message_socket_that_hangs_ends_the_signs_of_life(manager, caplog):
    hanging = Probed(False)
    watched(hanging, hanging.wait_asked(4))
    assert manager.poll() == "STATUS=no jobs"
    assert manager.heard_nothing()
    assert caplog.messages == ["the message socket does not answer: no more signs of life for the service manager"]


def test_without_a_watchdog_only_the_work_is_told(manager, monkeypatch):
    monkeypatch.setenv("WATCHDOG_USEC", "0")
    assert watched(Probed(True), manager.hear_until("STATUS=no jobs")) == ["STATUS=no jobs"]


def test_without_a_manager_nothing_is_asked(monkeypatch):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    probed = Probed(True)
    watched(probed, asyncio.sleep(0.01))
    assert probed.asked == 0


def test_the_end_may_take_as_long_as_the_saves_may(manager):
    managed(Config(stop_timeout_s=600.0)).stopping()
    assert manager.hear() == {"STOPPING": "1", "EXTEND_TIMEOUT_USEC": "630000000", "STATUS": "stopping; no jobs"}


def test_a_reload_changes_what_may_change_and_names_the_rest(manager, tmp_path, caplog):
    caplog.set_level("INFO")
    running = Config()
    daemon = managed(running)
    (tmp_path / "ckptd.toml").write_text('write_threads = 9\nhttp = "127.0.0.1:1"\n')
    daemon.reload()
    assert manager.hear()["RELOADING"] == "1"
    assert manager.hear() == {"READY": "1", "STATUS": "no jobs; restart needed for http"}
    assert (running.write_threads, running.http) == (9, Config().http)
    assert caplog.messages == ["reload: changed write_threads; restart needed for http"]


@pytest.mark.parametrize("text", ["write_threads = 0", "threads = 1", "write_threads =", None])
def test_a_bad_file_keeps_the_old_configuration_and_says_so_in_one_line(manager, tmp_path, caplog, text):
    path = tmp_path / "ckptd.toml"
    running = Config(write_threads=5)
    daemon = managed(running)
    if text is not None:
        path.write_text(text)
    daemon.reload()
    assert manager.hear()["RELOADING"] == "1"
    told = manager.hear()
    assert told["READY"] == "1"
    assert told["STATUS"].startswith(f"no jobs; old configuration kept: {path}: ")
    assert running == Config(write_threads=5)
    [line] = caplog.messages
    assert line.startswith(f"reload: old configuration kept: {path}: ")
    path.write_text("write_threads = 6")
    daemon.reload()
    manager.hear()
    assert manager.hear()["STATUS"] == "no jobs"
    assert running.write_threads == 6


@pytest.mark.parametrize(
    ("level", "number"), [("ERROR", 3), ("WARNING", 4), ("INFO", 6), ("DEBUG", 7), ("CRITICAL", 3)]
)
def test_a_journal_gets_the_level_before_the_line(monkeypatch, level, number):
    record = logging.LogRecord("ckptd.x", getattr(logging, level), "", 0, "saved %s", ("a",), None)
    monkeypatch.setenv("JOURNAL_STREAM", "9:1")
    assert log_formatter().format(record) == f"<{number}>ckptd.x: saved a"
    monkeypatch.delenv("JOURNAL_STREAM")
    assert log_formatter().format(record).endswith(f"{level} ckptd.x: saved a")


def test_hanging_up_a_terminal_stops_and_a_signal_reloads(monkeypatch):
    def reload():
        """What SIGHUP means to a service."""

    def stop():
        """What it means to a daemon in a terminal."""

    for terminal, wanted in ((True, stop), (False, reload)):
        monkeypatch.setattr(os, "isatty", lambda _, terminal=terminal: terminal)
        assert on_hangup(reload, stop) is wanted
