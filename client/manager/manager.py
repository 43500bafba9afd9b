"""`CheckpointManager`: step-named checkpoints under one folder: when to save, what to keep, where to resume.

Only rank 0 lists, pins and asks for retention, and only its daemon removes; the other ranks are told. What readers and
retention see are committed checkpoints and nothing else.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch.distributed as dist

from ckptd.checkpoint.folder.catalog import CatalogEntry, list_entries, look_at
from ckptd.checkpoint.folder.pins import pin, unpin
from ckptd.checkpoint.folder.retention import best_first
from ckptd.checkpoint.folder.steps import step_name
from ckptd.checkpoint.folder.user_data import UserData
from ckptd.client.arguments import CheckpointId, manager_request, path_of
from ckptd.client.drain import DrainReport, drain
from ckptd.client.failure_policy import FailureCount, FailureOptions, FailurePolicy
from ckptd.client.failures import as_checkpoint_failure
from ckptd.client.loading.fallback import Wanted, load_newest_good
from ckptd.client.loading.loader import load
from ckptd.client.loading.match import Strict
from ckptd.client.loading.report import LoadReport
from ckptd.client.manager.decisions import Decision, Decisions
from ckptd.client.manager.options import CheckpointInfo, ManagerOptions, Restored, info_of
from ckptd.client.preemption import preemption
from ckptd.client.saving.futures import SaveFuture
from ckptd.client.session.exchange import COORDINATOR, place_in
from ckptd.client.session.sessions import live_session, policy_for, session_for
from ckptd.protocol.cadence import Cadence
from ckptd.protocol.errors import BadIndex, UnknownCheckpoint, Unsupported
from ckptd.protocol.retention_messages import Retain

logger = logging.getLogger(__name__)

# How long a process that leaves at once waits for the tensors of earlier saves to be staged.
_LEAVE_S = 60.0


class CheckpointManager:
    """Saves and restores the checkpoints of one training run. All ranks make one, and call it alike.

    Several managers, and several jobs, may use one folder: what is being read, saved or pinned by one is not removed
    for another. What is to be kept should be said alike, though: each removes what its own options do not keep.

    Args:
        root: The folder; it is made by the first save. Object stores are not supported here.
        options: When to save and what to keep.
        process_group: The ranks that save together; None is the default group, if there is one.
        no_dist: Be alone, whatever groups there are.

    Raises:
        Unsupported: The arguments do not go together.
    """

    def __init__(
        self,
        root: CheckpointId,
        options: ManagerOptions | None = None,
        *,
        process_group: dist.ProcessGroup | None = None,
        no_dist: bool = False,
    ) -> None:
        self.root = path_of(root, None, type(None), "root")
        self.options = options or ManagerOptions()
        self._group, self._no_dist = process_group, no_dist
        place = place_in(process_group, no_dist=no_dist)
        # Steps mean the same to all ranks; clocks and signals do not.
        agrees = self.options.every_minutes is not None or preemption() is not None
        self._decisions = Decisions(place) if agrees else None
        self._own_policy = self._make_policy()
        now = time.monotonic()
        self._cadence = Cadence(every_steps=self.options.every_steps, every_s=self.options.every_s, now_s=now)
        self._decided: tuple[int, Decision] | None = None
        self._preempted = False

    def _make_policy(self) -> FailurePolicy | None:
        options = self.options
        if options.on_failure is None:
            return None
        failing = FailureOptions(
            on_failure=options.on_failure,
            max_consecutive_failures=options.max_consecutive_failures,
            pause_timeout_s=options.pause_timeout_s,
            catches=options.on_failure != "raise",
        )
        return FailurePolicy(failing, place=lambda: place_in(self._group, no_dist=self._no_dist))

    # --- saving --------------------------------------------------------------------------------------------------

    @as_checkpoint_failure()
    def should_save(self, step: int) -> bool:
        """Return whether a checkpoint is due at a step boundary, on all ranks alike.

        Due is what the interval says, and the first step after notice of a preemption.

        Args:
            step: The step that has just been made; calls go up.
        """
        if self._decided is None or self._decided[0] != step:
            self._decided = (step, self._decide(step))
        return self._decided[1].save and self._cadence.is_new(step)

    def _decide(self, step: int) -> Decision:
        handler = preemption()
        preempted = handler is not None and handler.requested
        mine = Decision(self._cadence.due(step, time.monotonic()) or preempted, preempted)
        decision = mine if self._decisions is None else self._decisions.take(mine)
        if decision.preempted and not self._preempted:
            logger.warning("preempted: step %d is saved in any case", step)
            self._preempted = True
        return decision

    @property
    def preempted(self) -> bool:
        """Whether this job has been told to end, as all ranks knew at the last step boundary; then drain and leave."""
        return self._preempted

    @as_checkpoint_failure()
    def save(
        self,
        step: int,
        state_dict: dict[str, Any],
        *,
        metrics: Mapping[str, float] | None = None,
        metadata: Any = None,
        force: bool = False,
    ) -> SaveFuture | None:
        """Save a step if it is due. Returns when the tensors may change, or at once with background staging.

        Args:
            step: The step; its checkpoint is ``root/step-N``.
            state_dict: What is saved.
            metrics: Numbers to find the best checkpoints by; those of rank 0 are stored.
            metadata: Anything that JSON can hold, at most 16 KiB; that of rank 0 is stored, with the checkpoint and
                not a moment before or after it.
            force: Save whether it is due or not.

        Returns:
            The save's future; None if nothing was due.

        Raises:
            Unsupported: Metrics or metadata cannot be stored.
            SystemExit: The job was preempted and the handler says ``when="now"``: all is handed over to the daemon.
            CkptdError: What ``on_failure`` makes of earlier saves.
        """
        if step < 0:
            raise Unsupported(f"step {step}", "give 0 or more")
        data = UserData(step, metrics or {}, metadata).encode()
        due = self.should_save(step)
        handler = preemption() if self._preempted else None
        leaves = handler is not None and handler.when == "now"
        future: SaveFuture | None = None
        if due or force:
            begun = time.monotonic()
            policy = self._own_policy or policy_for(self._group, no_dist=self._no_dist)
            begin = partial(self._begin, step, state_dict, data, blocking=leaves)
            future = policy.save(begin, checkpoint_id=self._path(step))
            self._cadence.note_saved(step, begun)
        if handler is not None and leaves:
            report = drain(_LEAVE_S, until="staged")
            logger.warning("preempted: leaving at step %d; the daemon finishes %s", step, report.staged or "nothing")
            raise SystemExit(handler.exit_status)
        return future

    def _begin(self, step: int, state_dict: dict[str, Any], data: str, *, blocking: bool) -> SaveFuture:
        session = session_for(self._group, no_dist=self._no_dist)
        first = session.identity.rank == COORDINATOR
        background = session.options.staging == "background" and not blocking
        user, keep = (data, self.options.keep()) if first else ("", None)
        request = manager_request(self._path(step), background=background, user=user, keep=keep)
        return session.save(state_dict, request)

    def _path(self, step: int) -> str:
        return os.path.join(self.root, step_name(step))

    def drain(self, deadline_s: float, *, until: Literal["committed", "staged"] = "committed") -> DrainReport:
        """Wait for the saves of this process that are under way; see :func:`ckptd.client.drain`."""
        return drain(deadline_s, until=until)

    @property
    def failures(self) -> FailureCount:
        """How many saves have failed, in all and in a row."""
        return (self._own_policy or policy_for(self._group, no_dist=self._no_dist)).count

    # --- listing -------------------------------------------------------------------------------------------------

    def all(self) -> list[CheckpointInfo]:
        """Return the committed, complete checkpoints that have a step, the oldest first, as this process sees them."""
        return [info_of(entry) for entry in reversed(self._entries())]

    def steps(self) -> list[int]:
        """Return the steps of :meth:`all`, each once."""
        return sorted({info.step for info in self.all()})

    def latest(self) -> CheckpointInfo | None:
        """Return the checkpoint with the highest step, if there is any."""
        return next((info_of(entry) for entry in self._entries()), None)

    def best(self) -> CheckpointInfo | None:
        """Return the one with the best metric, if any has it. Raises Unsupported if the options name no metric."""
        return next((info_of(entry) for entry in self._best_first(self._entries())), None)

    def _entries(self) -> list[CatalogEntry]:
        return [entry for entry in list_entries(self.root) if entry.complete and entry.step is not None]

    def _best_first(self, entries: list[CatalogEntry]) -> list[CatalogEntry]:
        return best_first(entries, self._check_metric(), mode=self.options.mode)

    def _check_metric(self) -> str:
        if not self.options.metric:
            raise Unsupported("the best checkpoint without a metric", "give ManagerOptions(metric=...)")
        return self.options.metric

    # --- restoring -----------------------------------------------------------------------------------------------

    @as_checkpoint_failure()
    def restore(
        self,
        state_dict: dict[str, Any],
        step: int | Literal["latest", "best"] = "latest",
        *,
        fallback: bool | None = None,
        strict: Strict = True,
    ) -> Restored | None:
        """Load a checkpoint into a state dict, the same one on all ranks.

        Args:
            state_dict: Filled in place, as by :func:`ckptd.client.load`.
            step: Which one: a step, the latest, or the best by the options' metric.
            fallback: Whether the next older one (of the best, the next best one) is taken in the place of one that is
                damaged; each is then verified as a whole before anything is touched. None: unless a step is given.
            strict: See :func:`ckptd.client.load`.

        Returns:
            The step to go on from, what was saved with it and a report; None if there is no checkpoint at all, so that
            training begins anew.

        Raises:
            UnknownCheckpoint: There is no checkpoint of this step, or none with the metric.
            NoGoodCheckpoint: There are checkpoints, but all are damaged.
            CkptdError: What a load raises.
        """
        if isinstance(step, str) and step not in {"latest", "best"}:
            raise Unsupported(f"step={step!r}", "give a number, 'latest' or 'best'")
        if step == "best":
            self._check_metric()
        place = place_in(self._group, no_dist=self._no_dist)
        falls_back = isinstance(step, str) if fallback is None else fallback
        wanted = Wanted(self.root, lambda: self._candidates(step), verified=falls_back)

        def load_one(path: str) -> LoadReport:
            report = load(
                state_dict, checkpoint_id=path, process_group=self._group, no_dist=self._no_dist, strict=strict
            )
            assert report is not None
            return report

        report = load_newest_good(wanted, load_one, place=place)
        if report is None:
            if step != "latest":
                raise UnknownCheckpoint(self._path(step) if isinstance(step, int) else self.root)
            return None
        return self._restored(report)

    def _restored(self, report: LoadReport) -> Restored:
        entry = look_at(report.path)
        if entry is None or entry.step is None:
            raise BadIndex(report.path, "it was removed or replaced while it was loaded")
        info = info_of(entry)
        self._cadence.note_saved(info.step, time.monotonic())
        self._decided = None
        return Restored(step=info.step, metrics=info.metrics, metadata=info.metadata, report=report)

    def _candidates(self, step: int | str) -> list[str]:
        """Return what may be loaded, the most wanted first, damaged ones among it."""
        entries = [entry for entry in list_entries(self.root) if entry.step is not None]
        if step == "best":
            entries = self._best_first(entries)
        elif isinstance(step, int):
            entries = [entry for entry in entries if entry.step is not None and entry.step <= step]
            if not entries or entries[0].step != step:
                return []
        return [entry.path for entry in entries]

    # --- keeping -------------------------------------------------------------------------------------------------

    @as_checkpoint_failure()
    def pin(self, step: int) -> None:
        """Keep a checkpoint whatever the options say, until it is unpinned: a file ``.pinned`` in its directory.

        Raises:
            UnknownCheckpoint: There is none of this step.
        """
        if self._is_first:
            pin(self._found(step))

    @as_checkpoint_failure()
    def unpin(self, step: int) -> None:
        """Let retention treat a checkpoint as any other again. Raises UnknownCheckpoint."""
        if self._is_first:
            unpin(self._found(step))

    def _found(self, step: int) -> str:
        found = next((entry.path for entry in self._entries() if entry.step == step), None)
        if found is None:
            raise UnknownCheckpoint(self._path(step))
        return found

    @as_checkpoint_failure()
    def retain(self) -> None:
        """Have the daemon remove now what the options do not keep; after each commit it does so without being asked."""
        keep = self.options.keep()
        if keep is not None and self._is_first:
            session_for(self._group, no_dist=self._no_dist).link.send(Retain(self.root, keep))

    @property
    def _is_first(self) -> bool:
        session = live_session(self._group, no_dist=self._no_dist)
        if session is not None:
            return session.identity.rank == COORDINATOR
        alone = self._no_dist or not dist.is_available() or not dist.is_initialized()
        return alone or dist.get_rank(self._group) == COORDINATOR
