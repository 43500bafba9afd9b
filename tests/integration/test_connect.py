"""`connect` opens the session ahead of the first save and says what a save does when all slots are busy."""

import os
import threading
from pathlib import Path

import pytest
import torch
from support.clients import assert_holds
from support.nursery import state
from support.processes import stopped
from support.trees import below
from support.waiting import wait_until

from ckptd.protocol.errors import DaemonUnavailable, SaveSkipped, SlotsBusy, Unsupported


def cause(future):
    """Return the wire name of a failed save's root cause."""
    error = future.exception(30)
    return getattr(error, "cause_code", error.code)


def test_connect_with_a_state_dict_makes_plan_and_arena_ahead(daemon, client, tmp_path):
    session = client.connect(state(4))
    [job] = daemon.status()["jobs"]
    assert job["generations"] == []
    [rank] = job["sessions"]
    assert (rank["rank"], rank["pid"]) == (0, os.getpid())
    assert [slot["state"] for slot in rank["slots"]] == ["free", "free"]
    assert rank["slot_bytes"] >= 4 << 20
    [arena] = below(daemon.runtime.arenas, "*.arena")
    assert arena.stat().st_blocks * 512 >= 2 * (4 << 20)  # its pages are there before the first save
    with stopped(*daemon.workers()):  # nobody is left who could plan
        future = client.async_save(state(4, 2.0), checkpoint_id=tmp_path / "a")
        assert future.state == "staged"
    future.result(30)
    assert below(daemon.runtime.arenas, "*.arena") == [arena]
    assert session.live
    assert_holds(tmp_path / "a", mib=4, value=2.0)


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_so_many_saves_can_be_staged_at_a_time(daemon, client, tmp_path, slots):
    client.connect(state(), slots=slots, on_busy="fail")
    with stopped(*daemon.workers()):
        staged = [client.async_save(state(), checkpoint_id=tmp_path / str(n)) for n in range(slots)]
        assert [future.state for future in staged] == ["staged"] * slots
        refused = client.async_save(state(), checkpoint_id=tmp_path / "refused")
        assert cause(refused) == SlotsBusy.code
        assert f"all {slots} slots" in str(refused.exception())
    for future in staged:
        future.result(30)
    assert not (tmp_path / "refused").exists()
    client.save(state(), checkpoint_id=tmp_path / "next")


def test_skip_leaves_the_save_out_and_says_so(daemon, client, tmp_path):
    client.connect(state(), slots=1, on_busy="skip")
    with stopped(*daemon.workers()):
        staged = client.async_save(state(), checkpoint_id=tmp_path / "a")
        skipped = client.async_save(state(), checkpoint_id=tmp_path / "skipped")
        assert cause(skipped) == SaveSkipped.code
        assert "skipped" in str(skipped.exception())
    staged.result(30)
    assert not (tmp_path / "skipped").exists()
    assert daemon.metric('ckptd_saves_total{outcome="skipped"}') == 1


def test_whoever_hears_of_a_commit_may_save_at_once(daemon, client, tmp_path):
    client.connect(state(), slots=1, on_busy="fail")
    for number in range(100):
        client.async_save(state(), checkpoint_id=tmp_path / str(number % 2)).result(30)


def test_wait_waits_until_a_slot_is_free(daemon, client, tmp_path):
    client.connect(state(), slots=1)
    futures = []
    with stopped(*daemon.workers()):
        futures.append(client.async_save(state(value=2.0), checkpoint_id=tmp_path / "a"))
        waiting = threading.Thread(
            target=lambda: futures.append(client.async_save(state(value=3.0), checkpoint_id=tmp_path / "b"))
        )
        waiting.start()
    waiting.join(20)
    for future in futures:
        future.result(30)
    assert_holds(tmp_path / "b", value=3.0)


def test_wait_has_a_deadline(daemon, client, tmp_path):
    client.connect(state(), slots=1, busy_timeout_s=0.2)
    with stopped(*daemon.workers()):
        staged = client.async_save(state(), checkpoint_id=tmp_path / "a")
        late = client.async_save(state(), checkpoint_id=tmp_path / "b")
        assert cause(late) == SlotsBusy.code
    staged.result(30)
    client.save(state(), checkpoint_id=tmp_path / "c")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"on_busy": "never"}, "on_busy"),
        ({"staging": "later"}, "staging"),
        ({"slots": 0}, "slots=0"),
        ({"slots": 1000}, "slots=1000"),
        ({"slot_bytes": 1}, "slot_bytes=1"),
        ({"connect_timeout_s": 0}, "connect_timeout_s"),
        ({"busy_timeout_s": float("inf")}, "busy_timeout_s"),
        ({"progress_timeout_s": -1}, "progress_timeout_s"),
        ({"rank": 0}, "world_size"),
        ({"rank": 0, "world_size": 2}, "job"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_opened(daemon, client, options, words):
    with pytest.raises(Unsupported, match=words):
        client.connect(**options)
    assert daemon.status()["jobs"] == []


def test_no_daemon_and_none_may_be_started(runtime, client, tmp_path):
    with pytest.raises(DaemonUnavailable) as caught:
        client.async_save(state(), checkpoint_id=tmp_path / "a")
    assert runtime.path in str(caught.value)
    assert "ckptd serve" in str(caught.value)
    assert "CKPTD_EMBEDDED" in str(caught.value)


def test_a_daemon_that_cannot_start_is_reported_with_its_reason(runtime, client, monkeypatch):
    monkeypatch.setenv("CKPTD_EMBEDDED", "1")
    config = Path(runtime.path, "bad.toml")
    config.write_text("no_such_key = 1\n")
    monkeypatch.setenv("CKPTD_CONFIG", str(config))
    with pytest.raises(DaemonUnavailable) as caught:
        client.connect(connect_timeout_s=20)
    assert runtime.path in str(caught.value)
    assert "no_such_key" in str(caught.value)


def test_a_closed_session_gives_its_memory_back(daemon, client, tmp_path):
    def mapped():
        return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(daemon.runtime.arenas) in line]

    session = client.connect(state(8))
    client.save(state(8), checkpoint_id=tmp_path / "a")
    assert mapped()
    session.close()
    assert not mapped()
    wait_until(lambda: not below(daemon.runtime.arenas, "*.arena"), "the removal of the arena")
    client.save(state(8, 2.0), checkpoint_id=tmp_path / "a", no_dist=True)
    assert_holds(tmp_path / "a", mib=8, value=2.0)


def test_threads_may_save_at_the_same_time(daemon, client, tmp_path):
    client.connect(slots=3)
    futures = {}

    def save(number):
        futures[number] = client.async_save(
            {"w": torch.full((1000,), float(number))}, checkpoint_id=tmp_path / str(number)
        )

    threads = [threading.Thread(target=save, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for number, future in futures.items():
        future.result(30)
        found = {"w": torch.zeros(1000)}
        client.load(found, checkpoint_id=tmp_path / str(number))
        assert torch.equal(found["w"], torch.full((1000,), float(number)))
    assert len(futures) == 6
