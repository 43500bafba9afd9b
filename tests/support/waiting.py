"""Waiting for what happens elsewhere: always for an event, never without a deadline."""

from __future__ import annotations

import select
import time

# A healthy event takes milliseconds; the machine that runs the tests is small and shared.
PATIENCE_S = 20.0


def wait_until(predicate, what, *, timeout_s=PATIENCE_S):
    """Return the first true value of ``predicate``; fail if there is none in time."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:.0f} s: {what}")
        time.sleep(0.005)


def wait_readable(descriptor, what, *, timeout_s=PATIENCE_S):
    """Wait until a descriptor can be read, as one of a process that has ended can."""
    ready, _, _ = select.select([descriptor], [], [], timeout_s)
    if not ready:
        raise AssertionError(f"not within {timeout_s:.0f} s: {what}")
