"""The plan that a job's saves are staged under, and the files of those that nobody needs any more.

Invariant: a plan is kept for the next save only after a save under it was committed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable

from ckptd.daemon.job.generation import RANKS_SUFFIX, CurrentPlan
from ckptd.daemon.recovery.job_log import JobLog


class Plans:
    """A job's plan in force.

    Args:
        log: The job's part of the journal.
        in_use: Returns the plans of the generations in flight.
    """

    def __init__(self, log: JobLog, in_use: Callable[[], Iterable[CurrentPlan]]) -> None:
        self._log, self._in_use = log, in_use
        self.in_force: CurrentPlan | None = None

    def put_in_force(self, plan: CurrentPlan | None) -> None:
        """Use another plan from now on, or none: then the next save plans anew."""
        older, self.in_force = self.in_force, plan
        if older is not None and older is not plan:
            self._log.plan(older, in_force=False)
            self.remove_unneeded(older)

    def note_commit(self, plan: CurrentPlan) -> None:
        """A save under this plan was committed."""
        if plan is self.in_force and not plan.committed:
            plan.committed = True
            self._log.plan(plan, in_force=True)

    def doubt(self, *, always: bool) -> bool:
        """A save has failed: forget a plan that was never committed under, or any. Return whether there is none now."""
        if always or self.in_force is None or not self.in_force.committed:
            self.put_in_force(None)
        return self.in_force is None

    def remove_unneeded(self, plan: CurrentPlan) -> None:
        """Remove the files of a plan that is neither in force nor needed by a generation in flight."""
        if plan is self.in_force or any(used is plan for used in self._in_use()):
            return
        self._log.plan_over(plan.path)
        for path in (plan.path, plan.path + RANKS_SUFFIX):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
