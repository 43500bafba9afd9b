"""The signal handler: sets a flag, wakes who waits, passes the signal on, and leaves no trace when it is taken out."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from ckptd.client.preemption import install_preemption_handler, preemption
from ckptd.protocol.errors import Unsupported

USR = signal.SIGUSR1


@pytest.fixture
def install():
    """Install handlers of SIGUSR1, and take them out again."""
    before = signal.getsignal(USR)
    installed = []

    def install(**options):
        installed.append(install_preemption_handler(**{"signals": [USR], **options}))
        return installed[-1]

    yield install
    for handler in reversed(installed):
        handler.uninstall()
    signal.signal(USR, before)
    assert preemption() is None


def test_a_signal_sets_the_flag_and_nothing_else(install):
    handler = install()
    assert (handler.requested, handler.since_s) == (False, 0.0)
    os.kill(os.getpid(), USR)
    assert handler.requested
    assert handler.since_s >= 0
    assert preemption() is handler


def test_it_wakes_who_waits(install):
    handler = install()
    assert not handler.wait(0)
    threading.Timer(0.01, lambda: os.kill(os.getpid(), USR)).start()
    assert handler.wait(20)


def test_any_number_of_signals_does_no_harm(install):
    handler = install()
    for _ in range(100):
        os.kill(os.getpid(), USR)
    assert handler.requested


def test_the_handler_before_is_called_too(install):
    calls = []
    signal.signal(USR, lambda number, frame: calls.append((number, frame is not None)))
    first = install()
    second = install()
    os.kill(os.getpid(), USR)
    assert first.requested
    assert second.requested
    assert calls == [(USR, True)]


def test_what_the_handler_before_raises_comes_through_after_the_flag_is_set(install):
    def interrupt(*_):
        raise KeyboardInterrupt

    signal.signal(USR, interrupt)
    handler = install()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), USR)
    assert handler.requested


@pytest.mark.parametrize("disposition", [signal.SIG_DFL, signal.SIG_IGN])
def test_taken_out_it_leaves_what_was_there(install, disposition):
    signal.signal(USR, disposition)
    handler = install()
    handler.uninstall()
    assert signal.getsignal(USR) == disposition
    assert preemption() is None
    handler.uninstall()


def test_one_that_was_installed_over_it_stays(install):
    handler = install()
    signal.signal(USR, signal.SIG_IGN)
    handler.uninstall()
    assert signal.getsignal(USR) == signal.SIG_IGN


def test_a_forked_child_dies_of_the_signal_as_before(install):
    signal.signal(USR, signal.SIG_DFL)
    handler = install()
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), USR)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == USR
    assert not handler.requested


def test_the_exit_status_is_that_of_the_signal_or_as_told(install):
    handler = install(exit_status=7)
    told = install()
    os.kill(os.getpid(), USR)
    assert (handler.exit_status, told.exit_status) == (7, 128 + USR)


def test_it_is_for_the_main_thread_alone(install):
    refused = []

    def elsewhere():
        try:
            install()
        except Unsupported as error:
            refused.append(str(error))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "main thread" in refused[0]


def test_what_cannot_be_is_refused(install):
    with pytest.raises(Unsupported, match="when='later'"):
        install(when="later")
