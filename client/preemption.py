"""Notice of a preemption: a signal handler that users install, which sets a flag and does nothing else.

Python runs handlers between two bytecodes of the main thread, wherever that is; so the handler takes no lock, logs
nothing and calls nothing of ours: it writes two attributes and a byte into a pipe. What follows happens at the next
step boundary, in a call of the user's.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, Final, Literal

from ckptd.protocol.errors import Unsupported

When = Literal["step", "now"]
# What a shell reports of a process that a signal has ended. Source: POSIX, "Shell Command Language", 2.8.2.
_SIGNAL_STATUS: Final = 128

_current: list[PreemptionHandler] = []


class PreemptionHandler:
    """An installed handler; made by :func:`install_preemption_handler`.

    Attributes:
        when: See there.
    """

    def __init__(self, signals: Sequence[signal.Signals], when: When, exit_status: int | None) -> None:
        self.when: When = when
        self._exit_status = exit_status
        self._number = 0
        self._at_s = 0.0
        self._wake_receive, self._wake_send = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._previous: dict[int, Any] = {}
        for number in signals:
            self._previous[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self._number:
            self._number, self._at_s = number, time.monotonic()
        with contextlib.suppress(OSError):  # a full pipe wakes just as well
            os.write(self._wake_send, b"!")
        previous: Callable[[int, FrameType | None], object] | int | None = self._previous.get(number)
        if callable(previous):
            previous(number, frame)

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self._number != 0

    @property
    def since_s(self) -> float:
        """Seconds since the signal came; 0 if none has."""
        return time.monotonic() - self._at_s if self._number else 0.0

    @property
    def exit_status(self) -> int:
        """With which status this process shall leave."""
        return _SIGNAL_STATUS + self._number if self._exit_status is None else self._exit_status

    def wait(self, timeout_s: float) -> bool:
        """Wait for a signal, at most so many seconds; return whether one has come."""
        if not self.requested:
            select.select([self._wake_receive], [], [], timeout_s)
        return self.requested

    def uninstall(self) -> None:
        """Put back the handlers that were there before, where ours is still in place."""
        for number, previous in self._previous.items():
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, signal.SIG_DFL if previous is None else previous)
        if self in _current:
            _current.remove(self)
            os.close(self._wake_receive)
            os.close(self._wake_send)


def install_preemption_handler(
    *,
    signals: Sequence[signal.Signals] = (signal.SIGTERM,),
    when: When = "step",
    exit_status: int | None = None,
) -> PreemptionHandler:
    """Have a signal announce that this process will be ended: managers then save at the next step boundary.

    Install it on all ranks, and before making a :class:`~ckptd.client.manager.manager.CheckpointManager`: ranks of a
    process group then agree on the step, so that one signal to one of them is enough. A handler that was there before
    is called after ours.

    Args:
        signals: Which ones.
        when: ``"step"``: `should_save` and `preempted` answer True from the next step boundary on; the training loop
            saves, drains and leaves. ``"now"``: the next `save` call stages, hands over to the daemon, and leaves by
            SystemExit, whatever the interval.
        exit_status: With which status ``"now"`` leaves; None is 128 and the signal's number.

    Returns:
        The handler; ``requested`` tells whether a signal has come.

    Raises:
        Unsupported: This is not the main thread: only there Python lets handlers be installed.
    """
    if when not in {"step", "now"}:
        raise Unsupported(f"when={when!r}", "give 'step' or 'now'")
    if threading.current_thread() is not threading.main_thread():
        raise Unsupported("a signal handler installed from another thread", "call it in the main thread")
    handler = PreemptionHandler([signal.Signals(number) for number in signals], when, exit_status)
    _current.append(handler)
    return handler


def preemption() -> PreemptionHandler | None:
    """Return the handler that was installed last, if there is one."""
    return _current[-1] if _current else None


def _forget_in_child() -> None:
    """A forked child, a data loader's worker say, has to die of the signal as before."""
    for handler in list(_current):
        handler.uninstall()


os.register_at_fork(after_in_child=_forget_in_child)
