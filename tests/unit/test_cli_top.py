"""`ckptd top`: what it draws, and how fast things are."""

from __future__ import annotations

import json

import msgspec
import pytest
from rich.console import Console

from ckptd.daemon.cli import top as module
from ckptd.daemon.cli.status import Status
from ckptd.daemon.cli.top import Rates, render
from ckptd.protocol.errors import DaemonUnavailable

MB = 10**6


def save(sequence=1, state="staged", done=25 * MB, total=100 * MB, **more):
    facts = {"sequence": sequence, "checkpoint_id": f"/runs/step-{sequence}", "state": state, "seconds": 2.0}
    return {**facts, "bytes_done": done, "bytes_total": total, **more}


def status(*saves, job="gpt"):
    session = {"rank": 0, "pid": 42, "slots": [{"state": "free"}, {"state": "sealed"}], "slot_bytes": 4096}
    jobs = [{"job": job, "incarnation": 1, "uid": 7, "world_size": 1, "generations": list(saves)}]
    jobs[0]["sessions"] = [{**session, "silent_s": 0.1}]
    facts = {"pid": 11, "version": "9.9", "http": "127.0.0.1:1", "mode": "user", "uptime_s": 60.0, "workers": [12]}
    return {**facts, "jobs": jobs}


def parsed(facts):
    return msgspec.json.decode(json.dumps(facts).encode(), type=Status)


def drawn(facts, rates=None, width=100):
    console = Console(width=width, highlight=False, markup=False)
    with console.capture() as captured:
        console.print(render(parsed(facts), rates or {}))
    return captured.get()


def test_the_picture_names_daemon_slots_and_saves():
    text = drawn(status(save()))
    assert "ckptd 9.9, pid 11, user, up 60 s" in text
    assert "1 jobs, 1 ranks, 1 workers; slots: 1 free, 1 sealed" in text
    assert "##......  25 %" in text
    assert "/runs/step-1" in text


@pytest.mark.parametrize("width", [60, 80, 200])
def test_on_a_narrow_terminal_state_and_progress_are_still_whole(width):
    lines = drawn(status(save(state="committing", job="a" * 50)), width=width).splitlines()
    assert all(len(line) <= width for line in lines)
    assert any("committing" in line and "25 %" in line for line in lines)


def test_a_failed_save_tells_why_and_a_done_one_how_fast():
    text = drawn(status(save(1, "failed", error="disk full"), save(2, "committed", done=100 * MB)))
    assert "disk full" in text
    [line] = [line for line in text.splitlines() if "step-2" in line]
    assert "100 %" in line
    assert " 50 " in line, "100 MB in 2 s"


def test_of_what_has_ended_only_the_last_is_shown():
    text = drawn(status(*(save(n, "committed") for n in range(1, 20)), save(20)))
    shown = [n for n in range(1, 21) if f"step-{n} " in text + " " or f"step-{n}\n" in text]
    assert shown == [17, 18, 19, 20]


def test_names_of_others_cannot_steer_the_terminal():
    text = drawn(status(save(checkpoint_id="/c/\x1b[2J"), job="\x1b]0;x"))
    assert "\x1b" not in text


def test_the_rate_is_what_was_written_since_the_last_look():
    rates = Rates()
    assert rates.update(parsed(status(save(done=0))), 10.0) == {}
    assert list(rates.update(parsed(status(save(done=30 * MB))), 12.0).values()) == [15e6]
    assert list(rates.update(parsed(status(save(done=0))), 13.0).values()) == [0.0], "begun again by another worker"
    assert rates.update(parsed(status(save(done=100 * MB, state="committed"))), 14.0) == {}
    assert rates.update(parsed(status(save(2, done=5))), 15.0) == {}


def test_a_daemon_that_goes_away_is_told_and_waited_for(monkeypatch):
    def fetch(runtime):
        raise DaemonUnavailable("/run/ckptd", "gone")

    monkeypatch.setattr(module, "fetch_status", fetch)
    assert "no ckptd daemon at /run/ckptd: gone" in module._shown(Rates())
    monkeypatch.setattr(module, "fetch_status", lambda _: json.dumps(status(save())).encode())
    console = Console(width=100)
    with console.capture() as captured:
        console.print(module._shown(Rates()))
    assert "/runs/step-1" in captured.get()


def test_without_a_terminal_it_is_shown_once(run_cli, monkeypatch):
    monkeypatch.setattr(module, "fetch_status", lambda _: json.dumps(status(save())).encode())
    code, out, err = run_cli("top")
    assert (code, err) == (0, "")
    assert "25 %" in out
    assert "\x1b" not in out
    code, out, _ = run_cli("top", "--json")
    assert (code, json.loads(out)) == (0, status(save()))


def test_an_answer_that_is_none_is_one_line(run_cli, monkeypatch):
    monkeypatch.setattr(module, "fetch_status", lambda _: b"{}")
    code, _, err = run_cli("top")
    assert (code, err.count("\n")) == (1, 1)
