"""Loads from shared memory when something about it is wrong: right values all the same, from the disk at the worst."""

from __future__ import annotations

import os

import pytest
import torch
from support.memory import (
    ABSENT,
    DAMAGED,
    LOAD,
    OVERWRITTEN,
    PATIENT,
    SERVED,
    VALUES,
    arenas,
    spoil,
    values,
)
from support.processes import stopped, wait_gone
from support.waiting import wait_until

from ckptd.client.loading import retained
from ckptd.staging.arena import ALIGNMENT_BYTES

KEEP = {"retain_s": 600.0}


@pytest.fixture
def daemon(start_daemon):
    """A daemon that keeps the last commits of ended jobs."""
    return start_daemon(**KEEP)


def save(trainers, path, value=2.0):
    """Start a trainer that has saved."""
    trainer = trainers.start()
    trainer.do("dcp.save(state(value=value), checkpoint_id=path)", value=value, path=str(path))
    return trainer


def kill(daemon):
    """Kill a daemon and wait for its workers, which follow it."""
    workers = daemon.status()["workers"]
    daemon.kill()
    for worker in workers:
        wait_gone(worker)


@pytest.mark.parametrize("trainer_dies", ["before", "after", "never"])
def test_a_save_in_memory_survives_the_daemon_that_held_it(start_daemon, trainers, tmp_path, trainer_dies):
    daemon = start_daemon(**KEEP)
    old, new = save(trainers, tmp_path / "a"), trainers.start()
    if trainer_dies == "before":
        old.kill()
    kill(daemon)
    if trainer_dies == "after":
        old.kill()
    spoil(tmp_path / "a")
    successor = start_daemon(**KEEP)
    new.do(LOAD, mib=1, path=str(tmp_path / "a"))
    assert new.get(VALUES) == values("memory", 2.0)
    assert successor.metric(SERVED) == 1


def test_while_no_daemon_runs_the_disk_is_read(daemon, trainers, tmp_path):
    old, new = save(trainers, tmp_path / "a"), trainers.start()
    kill(daemon)
    new.do(LOAD, mib=1, path=str(tmp_path / "a"))
    assert new.get(VALUES) == values("disk", 2.0)
    old.kill()


def test_a_daemon_that_hangs_delays_a_load_by_a_moment(daemon, trainers, tmp_path):
    old, new = save(trainers, tmp_path / "a"), trainers.start()
    with stopped(daemon.pid):
        new.do("from ckptd.client.loading import retained\nbegun = time.monotonic()")
        new.do("assert retained.open_retained(path, 'a save') is None", path=str(tmp_path / "a"))
        assert new.get("time.monotonic() - begun") >= retained.ANSWER_WITHIN_S
        for trainer in (new, old):  # the second has a session, and its daemon does not answer there either
            trainer.do(LOAD.removeprefix(PATIENT), mib=1, path=str(tmp_path / "a"))
            assert trainer.get(VALUES) == values("disk", 2.0)
            assert trainer.get("report.seconds") < 5.0


@pytest.mark.parametrize("what", ["a wrong bit", "a wrong bit in an object", "cut short", "another sequence"])
def test_memory_that_is_damaged_is_not_believed(daemon, trainers, tmp_path, what):
    old, new = save(trainers, tmp_path / "a"), trainers.start()
    old.kill()
    [arena] = arenas(daemon)
    with arena.open("r+b") as file:
        data = file.read()
        if what == "cut short":
            os.ftruncate(file.fileno(), 2 * ALIGNMENT_BYTES)
        elif what == "another sequence":
            file.seek(64 + 8)
            file.write(b"\x09\x00" * 8)
        else:
            # The tensor's value, or the opcode and the value of the step.
            needle = torch.tensor([2.0] * 64).numpy().tobytes() if what == "a wrong bit" else b"K\x02."
            at = data.index(needle) + (1 if needle == b"K\x02." else 0)
            file.seek(at)
            file.write(bytes([data[at] ^ 1]))
    new.do(LOAD, mib=1, path=str(tmp_path / "a"))
    assert new.get(VALUES) == values("disk", 2.0)
    seen = [1, 0] if what == "another sequence" else [0, 1]
    assert [daemon.metric(ABSENT), daemon.metric(DAMAGED)] == seen
    assert daemon.metric(SERVED) == 0


SAVE_ON = """
stop = threading.Event()
def save_on():
    step = 0
    while not stop.is_set():
        step += 1
        weights = {f'w{n}': torch.full((1 << 16,), float(step)) for n in range(8)}
        dcp.save(weights, checkpoint_id=f'{folder}/{step % 3}')
saving = threading.Thread(target=save_on)
saving.start()
"""
LOAD_ON = """
sources, mixtures = [], []
found = {f'w{n}': torch.zeros(1 << 16) for n in range(8)}
for number in range(loads):
    sources.append(dcp.load(found, checkpoint_id=f'{folder}/{number % 3}', verify=False).source)
    values = torch.stack(list(found.values())).unique().tolist()
    if len(values) != 1:
        mixtures.append((number, sources[-1], values))
"""


def test_a_trainer_that_saves_on_never_makes_a_load_a_mixture(daemon, trainers, tmp_path):
    writer, reader = trainers.start(), trainers.start()
    reader.do(PATIENT)
    writer.do(SAVE_ON, folder=str(tmp_path))
    wait_until((tmp_path / "0").exists, "the third save", timeout_s=60)
    # Hashes are not asked: that the owner has staged over the slot has to be seen by its state alone.
    reader.do(LOAD_ON, folder=str(tmp_path), loads=150)
    writer.do("stop.set()\nsaving.join()")
    assert reader.get("mixtures") == []
    counts = [daemon.metric(name) for name in (SERVED, OVERWRITTEN, ABSENT)]
    assert counts[0] == reader.get("sources.count('memory')")
    assert sum(counts) >= 150
