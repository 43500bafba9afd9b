"""Saves of a small changing model with processes killed at random, and what must hold after each of them.

Everything that happens follows from the seed, but for the moment at which a signal arrives. Nothing here waits for time
in order to be right: the random pauses only spread the kills.
"""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from support.clients import stock_load
from support.daemons import Daemon
from support.processes import processes_of, wait_gone
from support.trainers import Ranks, TrainerDied, Trainers
from support.trees import below
from support.waiting import wait_until

import ckptd.client
from ckptd.checkpoint.verify import verify_checkpoint

WORLD_SIZE = 2
_IDS = 3  # checkpoints in turn, so that two thirds of the saves overwrite an older one in the end
_EVENTS = {"nothing": 60, "worker": 10, "daemon": 12, "trainer": 10, "trainer and daemon": 8}
_MOMENTS = ("while it stages", "when it is sealed", "later")
_PAUSE_S = 0.03
_SAMPLE_EVERY = 20
_STOCK_EVERY = 25

# What a rank saves: its own tensor, a replicated one and an object. A wider model has another structure.
MODEL = """
def model(step, width):
    own = {f'rank{rank}.{n}': torch.full((500 + n,), float(step)) for n in range(width)}
    return {'own': own, 'shared': torch.full((4000,), float(step)), 'step': step}
"""


@dataclass
class Sample:
    """Resources at a quiet moment, in bytes and counts."""

    daemon_rss_bytes: int
    daemon_descriptors: int
    shm_bytes: int
    journal_bytes: int


@dataclass
class Figures:
    """What happened in all."""

    saves: int = 0
    seconds: float = 0.0
    events: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    samples: list[Sample] = field(default_factory=list)

    def growth(self, name: str) -> tuple[int, int]:
        """Return a resource's largest value in the first and in the last third of the samples."""
        values = [getattr(sample, name) for sample in self.samples]
        third = max(1, len(values) // 3)
        return max(values[:third]), max(values[-third:])


class Soak:
    """One soak in a runtime directory of its own."""

    def __init__(self, runtime, nursery, directory, *, seed, **settings):
        self._runtime, self._nursery, self._directory = runtime, nursery, Path(directory)
        self._random, self._settings = random.Random(seed), settings
        self._held = {}  # checkpoint id -> the steps of which it may hold one
        self._trainers = Trainers(nursery, runtime)
        self._launches = 0
        self.figures = Figures()
        runtime.watched.append(self._directory)
        self._start_daemon()
        self._launch()

    def run(self, saves, *, on_save=lambda number: None):
        """Save so many times, and check everything after each."""
        begun = time.monotonic()
        for number in range(1, saves + 1):
            self._save(number)
            on_save(number)
        self.figures.seconds = time.monotonic() - begun
        return self.figures

    def close(self):
        """End everything; what is left then is a fault."""
        self._trainers.close()
        wait_until(lambda: not list(self._runtime.arenas.iterdir()), "the removal of the last arenas")
        self._daemon.stop()
        self._runtime.daemon_was_killed = False

    # --- processes -----------------------------------------------------------------------------------------------

    def _start_daemon(self):
        self._daemon = Daemon(self._runtime, **self._settings)

    def _restart_daemon(self):
        workers = self._daemon.status()["workers"]
        self._daemon.kill()
        for worker in workers:
            wait_gone(worker)
        self._start_daemon()

    def _launch(self):
        """Start the job's next incarnation; the ranks of the one before end."""
        self._trainers.close()
        self._launches += 1
        self._trainers = Trainers(self._nursery, self._runtime, log_prefix=f"launch-{self._launches}")
        self._ranks = Ranks(self._trainers.start() for _ in range(WORLD_SIZE))
        self._ranks.do(
            MODEL + "session = dcp.connect(job='soak', rank=rank, world_size=world_size, reconnect_timeout_s=30)"
        )

    # --- one save ------------------------------------------------------------------------------------------------

    def _save(self, number):
        event = self._random.choices(list(_EVENTS), list(_EVENTS.values()))[0]
        moment = self._random.choice(_MOMENTS)
        path = self._directory / f"id-{number % _IDS}"
        victim = self._random.randrange(WORLD_SIZE)
        source = f"future = dcp.async_save(model({number}, {self._random.choice((1, 1, 1, 2))}), checkpoint_id=path)"
        for rank, trainer in enumerate(self._ranks):
            trainer.start(source, rank=rank, path=str(path))
        sealed = False
        if moment != "while it stages":
            self._ranks.finish()
            sealed = True
        if moment != "when it is sealed":
            time.sleep(self._random.uniform(0, _PAUSE_S))
        dead = self._strike(event, victim)
        outcomes = self._outcomes(dead, finished=sealed)
        self._settle()
        self._check(number, path, sealed=sealed, outcomes=outcomes, event=f"{event}, {moment}")
        if dead:
            self._launch()
        self.figures.saves += 1
        self.figures.events[f"{event}, {moment}" if event != "nothing" else event] += 1
        if number % _SAMPLE_EVERY == 0:
            self.figures.samples.append(self._sample())

    def _strike(self, event, victim):
        """Kill what the event names; return the ranks that are dead."""
        dead = set()
        if event == "worker":
            workers = self._daemon.status()["workers"]
            if workers:
                psutil.Process(self._random.choice(workers)).kill()
        if "trainer" in event:
            self._ranks[victim].kill()
            dead.add(victim)
        if "daemon" in event:
            self._restart_daemon()
        return dead

    def _outcomes(self, dead, *, finished):
        """Return how the save ended for each rank that lives."""
        outcomes = []
        for rank, trainer in enumerate(self._ranks):
            if not finished:
                try:
                    trainer.finish()
                except TrainerDied:
                    assert rank in dead, f"rank {rank} died of itself"
            if rank not in dead:
                outcomes.append(trainer.get("outcome(future, 50)"))
        return outcomes

    def _settle(self):
        """Wait until nothing is under way."""
        wait_until(
            lambda: all(save["state"] in {"committed", "failed"} for save in self._daemon.generations()),
            "the end of all saves",
        )
        wait_until(lambda: not self._runtime.litter(), "the removal of hidden directories")

    # --- what must hold ------------------------------------------------------------------------------------------

    def _check(self, number, path, *, sealed, outcomes, event):
        where = f"save {number} ({event}): {outcomes}"
        committed = {outcome == "committed" for outcome in outcomes}
        assert len(committed) <= 1, f"ranks were told different things: {where}"
        found = value_of(path, by_stock=number % _STOCK_EVERY == 0)
        before = self._held.get(path)
        if sealed or True in committed:
            assert found == number, f"a sealed save is lost, {found} is there: {where}"
        elif False in committed:
            assert found == before, f"a failed save has changed the checkpoint from {before} to {found}: {where}"
        assert found in {before, number}, f"neither old nor new: {found}: {where}"
        self._held[path] = found
        for other, value in self._held.items():
            if other != path:
                assert value_of(other, by_stock=False) == value, f"{other} has changed: {where}"
        self.figures.outcomes["committed" if found == number else "failed, old one kept"] += 1

    def _sample(self):
        process = psutil.Process(self._daemon.pid)
        shm = sum(f.stat().st_blocks * 512 for f in below(self._runtime.arenas) if f.is_file())
        journal = sum(f.stat().st_size for f in below(self._runtime.journals()) if f.is_file())
        return Sample(process.memory_info().rss, process.num_fds(), shm, journal)


def value_of(path, *, by_stock):
    """Return the step that a checkpoint holds, in all its parts, or None if there is none."""
    if not path.exists():
        return None
    report = verify_checkpoint(str(path), threads=1)
    assert report.good, report.faults
    own = {f"rank{rank}.0": torch.zeros(500) for rank in range(WORLD_SIZE)}
    state = {"shared": torch.zeros(4000), "step": -1, "own": own}
    (stock_load if by_stock else load)(state, path)
    values = {float(t[0]) for t in (state["shared"], *state["own"].values())} | {float(state["step"])}
    assert len(values) == 1, f"parts of several saves: {values}"
    for tensor in (state["shared"], *state["own"].values()):
        assert torch.equal(tensor, torch.full_like(tensor, float(state["step"])))
    return int(state["step"])


def load(state, path):
    """Load with ckptd, alone."""
    ckptd.client.load(state, checkpoint_id=str(path), no_dist=True)


def leftovers(runtime):
    """Return what a closed soak has left: processes and files."""
    arenas = below(runtime.arenas)
    return [*processes_of(runtime.path), *map(str, arenas)]


def clear(directory):
    """Remove a soak's checkpoints."""
    shutil.rmtree(directory, ignore_errors=True)
