"""Tells the metrics, and the timeline of the save itself, how the saves of one job go on."""

from __future__ import annotations

import time

from ckptd.daemon.job.generation import Generation
from ckptd.daemon.monitoring.labels import Phase
from ckptd.daemon.monitoring.metrics import Metrics
from ckptd.daemon.monitoring.rhythm import Rhythm
from ckptd.protocol.errors import CkptdError, SaveSkipped
from ckptd.protocol.messages import Sealed, WriteDone


class SaveWatch:
    """The observer of one job's saves; each method is called where the thing happens."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.rhythm = Rhythm()

    def sealed(self, generation: Generation, rank: int, message: Sealed) -> None:
        """A rank's image is complete."""
        self.took(generation, "stage", message.stage_s)
        self.took(generation, "plan", message.plan_s, ended_ago_s=message.stage_s)
        generation.timeline.sealed(rank)
        self._metrics.observe_stall(message.stall_s)
        self._metrics.staged(message.image_bytes)

    def writing_began(self, generation: Generation, waited_s: float) -> None:
        """A worker took up an image that had waited for it."""
        self.took(generation, "queue", waited_s)
        generation.timeline.writing_began()

    def write_begun_anew(self) -> None:
        """An image is written again after an error that passes."""
        self._metrics.write_retried()

    def written(self, generation: Generation, done: WriteDone) -> None:
        """A rank's image is durable."""
        self.took(generation, "write", done.write_s, ended_ago_s=done.fsync_s)
        self.took(generation, "fsync", done.fsync_s)
        self._metrics.written(done.bytes_written, done.write_s + done.fsync_s)

    def handed_over(self, generation: Generation, seconds: float) -> None:
        """The users' own writers have saved all ranks' images, in so many seconds."""
        self.took(generation, "write", seconds)
        self._metrics.written(generation.bytes_total)

    def took(self, generation: Generation, phase: Phase, seconds: float, *, ended_ago_s: float = 0.0) -> None:
        """A phase has ended: so long ago, after so many seconds."""
        self._metrics.observe_phase(phase, seconds, save_id=generation.save_id)
        generation.timeline.took(phase, seconds, ended_ago_s=ended_ago_s)

    def committed(self, generation: Generation, nbytes: int) -> None:
        """A checkpoint of ``nbytes`` bytes is published."""
        save_id, timeline = generation.save_id, generation.timeline
        self._metrics.committed(nbytes, generation.seconds, now=time.time(), save_id=save_id)
        interval = self.rhythm.committed(time.monotonic())
        if interval is not None:
            self._metrics.observe_interval(interval)
        slowest = timeline.slowest()
        if slowest is not None:
            self._metrics.observe_slowest_rank(slowest[1], save_id=save_id)
        rate = timeline.rate(sum(generation.bytes_done.values()), running=False)
        if rate is not None:
            self._metrics.save_written(rate)

    def failed(self, error: CkptdError) -> None:
        """A save has failed, or was left out."""
        if isinstance(error, SaveSkipped):
            self._metrics.skipped()
        else:
            self._metrics.failed(error)
