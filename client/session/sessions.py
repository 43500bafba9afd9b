"""The sessions of this process: one per group of ranks that saves together, opened by `connect` or the first save."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Mapping
from typing import Any, Final, Literal

import torch
import torch.distributed as dist

from ckptd.client.arguments import plan_settings
from ckptd.client.failure_policy import FailureOptions, FailurePolicy
from ckptd.client.saving.slots import OnBusy
from ckptd.client.session.exchange import place_in
from ckptd.client.session.identity import Identity, alone, of_group
from ckptd.client.session.options import SessionOptions
from ckptd.client.session.session import Session
from ckptd.protocol.errors import Unsupported
from ckptd.protocol.failing import OnFailure

_DEFAULT: Final = "default"

_sessions: dict[str, Session] = {}
_policies: dict[str, FailurePolicy] = {}
_opening = threading.RLock()


def connect(
    state_dict: Mapping[str, Any] | None = None,
    *,
    job: str | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    process_group: dist.ProcessGroup | None = None,
    on_busy: OnBusy = "wait",
    staging: Literal["blocking", "background", "waves"] = "blocking",
    slots: int = 2,
    slot_bytes: int | None = None,
    connect_timeout_s: float = 60.0,
    busy_timeout_s: float = 600.0,
    progress_timeout_s: float = 300.0,
    on_failure: OnFailure = "continue",
    max_consecutive_failures: int | None = None,
    pause_timeout_s: float = 600.0,
    reconnect_timeout_s: float = 60.0,
) -> Session:
    """Open the session ahead of the first save; all ranks must call it alike. Optional.

    Args:
        state_dict: What will be saved: plan it, and make, touch and pin the arena now.
        job: Name of the job; the default is unique to this start. Ranks told by arguments share it.
        rank: This process's rank, for jobs without a process group; needs ``world_size`` and ``job``.
        world_size: Number of ranks.
        process_group: The ranks that save together; the default is the default group, if there is one.
        on_busy: What a save does when all slots are being written: wait (at most ``busy_timeout_s``), skip or fail.
        staging: "blocking": `async_save` returns when the tensors may change. "background": it returns at once, and
            they may change when ``staging_completion`` is done; see :func:`wait_for_staging`. "waves": as "blocking",
            but what is larger than a slot goes through the slots part by part, while the parts before it are written:
            memory stays ``slots`` times ``slot_bytes``, and the call takes as long as the disk does.
        slots: How many saves can be staged at a time; with "waves", how many parts of one.
        slot_bytes: Size of a slot in bytes, made now and never enlarged; None sizes it by the first state dict, and
            with "waves" is 64 MiB.
        connect_timeout_s: How long to wait for the daemon, and for the other ranks, in seconds.
        busy_timeout_s: How long a save waits for a free slot, in seconds.
        progress_timeout_s: A save that has made no progress for so long fails on all ranks, in seconds.
        on_failure: What the next save call does about a save that failed: "continue" (it is logged, counted and told
            to whoever listens), "raise" it, or "pause": save again and again, until that works or
            ``pause_timeout_s`` have passed. The tensors of a pausing call are those that it was given.
        max_consecutive_failures: After so many failures in a row the next save call raises SavesFailing.
        pause_timeout_s: See ``on_failure``, in seconds.
        reconnect_timeout_s: How long to wait for the successor of a daemon that went away, in seconds. It goes on with
            what is under way; without one, the saves under way fail.

    Raises:
        DaemonUnavailable: There is no daemon and none could be started.
        ShmTooSmall: The arena does not fit; nothing was made.
        CkptdError: See the message.
    """
    options = SessionOptions(
        on_busy=on_busy,
        staging=staging,
        slots=slots,
        slot_bytes=slot_bytes,
        connect_timeout_s=connect_timeout_s,
        busy_timeout_s=busy_timeout_s,
        progress_timeout_s=progress_timeout_s,
        reconnect_timeout_s=reconnect_timeout_s,
    )
    failing = FailureOptions(
        on_failure=on_failure,
        max_consecutive_failures=max_consecutive_failures,
        pause_timeout_s=pause_timeout_s,
        catches=on_failure == "pause",
    )
    if (rank is None) != (world_size is None):
        raise Unsupported("rank without world_size, or the other way round", "give both or neither")
    with _opening:
        if rank is not None and world_size is not None:
            if job is None and world_size > 1:
                raise Unsupported("a job of several ranks without a name", "give connect(job=...), alike on all ranks")
            identity = Identity(job, rank, world_size) if job else alone()
            key = _DEFAULT
        else:
            identity = _identity(process_group, job=job, timeout_s=connect_timeout_s)
            key = _key(process_group, no_dist=False)
        _drop(key)
        session = Session(identity, options)
        _sessions[key] = session
        _policies[key] = FailurePolicy(failing, place=lambda: place_in(process_group, no_dist=False))
    if state_dict is not None:
        session.prepare(state_dict, settings=plan_settings(flat=False, lowest=False))
    return session


def wait_for_staging(optimizer: torch.optim.Optimizer) -> Any:
    """Make `optimizer.step` wait until the last save of this process is staged.

    Args:
        optimizer: Whose steps change the saved tensors.

    Returns:
        torch's handle of the hook; its ``remove()`` takes the hook out.
    """

    def wait(*_: Any) -> None:
        for session in list(_sessions.values()):
            session.wait_for_staging()

    return optimizer.register_step_pre_hook(wait)


def session_for(group: dist.ProcessGroup | None, *, no_dist: bool) -> Session:
    """Return the live session of a group of ranks; open one if there is none."""
    key = _key(group, no_dist=no_dist)
    with _opening:
        session = _sessions.get(key)
        if session is not None and session.live:
            return session
        identity, options = _identity(group, job=None, timeout_s=60.0, no_dist=no_dist), SessionOptions()
        if session is not None:
            # The daemon went away: reach the one that took its place, as who we were.
            identity, options = session.identity_for_reopening(identity), session.options
            session.close()
        _sessions[key] = session = Session(identity, options)
        return session


def policy_for(group: dist.ProcessGroup | None, *, no_dist: bool) -> FailurePolicy:
    """Return what the saves of a group of ranks do about failures, as `connect` was told."""
    unasked = FailurePolicy(FailureOptions(), place=lambda: place_in(group, no_dist=no_dist))
    return _policies.setdefault(_key(group, no_dist=no_dist), unasked)


def live_session(group: dist.ProcessGroup | None, *, no_dist: bool) -> Session | None:
    """Return the session of a group of ranks if there is a live one; opens none."""
    session = _sessions.get(_key(group, no_dist=no_dist))
    return session if session is not None and session.live else None


def _key(group: dist.ProcessGroup | None, *, no_dist: bool) -> str:
    if no_dist:
        return "no_dist"
    if group is None:
        return _DEFAULT
    return "ranks " + "-".join(str(rank) for rank in dist.get_process_group_ranks(group))


def _identity(group: dist.ProcessGroup | None, *, job: str | None, timeout_s: float, no_dist: bool = False) -> Identity:
    if no_dist or not dist.is_available() or not dist.is_initialized():
        return alone(job)
    return of_group(group, job=job, timeout_s=timeout_s)


def _drop(key: str) -> None:
    _policies.pop(key, None)
    session = _sessions.pop(key, None)
    if session is not None:
        session.close()


def close_all() -> None:
    """End every session of this process."""
    for key in list(_sessions):
        _drop(key)


# A forked child (a data loader's worker) must not speak in its parent's name.
os.register_at_fork(after_in_child=_sessions.clear)
os.register_at_fork(after_in_child=_policies.clear)
atexit.register(close_all)
