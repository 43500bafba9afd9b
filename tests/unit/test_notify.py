"""The service manager's protocols, against sockets of our own."""

from __future__ import annotations

import os
import secrets
import socket
import time

import pytest
from support.managers import manager_at

from ckptd.daemon.systemd import notify
from ckptd.daemon.systemd.notify import Notifier, choose_listener, take_listeners, watchdog_s


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path, monkeypatch):
    address = str(tmp_path / "notify") if request.param == "path" else f"@ckptd-test-{secrets.token_hex(4)}"
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    with manager_at(address) as manager:
        yield manager


def test_what_is_told(manager):
    notifier = Notifier.from_environment()
    assert notifier.active
    assert "NOTIFY_SOCKET" not in os.environ, "a worker would speak in the daemon's name"
    notifier.ready("no jobs")
    assert manager.hear() == {"READY": "1", "STATUS": "no jobs"}
    notifier.alive()
    assert manager.hear() == {"WATCHDOG": "1"}
    notifier.stopping("finishing", most_s=90.5)
    assert manager.hear() == {"STOPPING": "1", "EXTEND_TIMEOUT_USEC": "90500000", "STATUS": "finishing"}


def test_a_reload_carries_the_monotonic_time(manager):
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    Notifier.from_environment().reloading()
    told = manager.hear()
    assert told["RELOADING"] == "1"
    assert before <= int(told["MONOTONIC_USEC"]) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


def test_a_status_is_said_once_and_on_one_line(manager):
    notifier = Notifier.from_environment()
    notifier.status("a\nREADY=1")
    assert manager.hear() == {"STATUS": "a?READY=1"}
    notifier.status("a\nREADY=1")
    assert manager.heard_nothing()
    notifier.status("b" * 1000)
    assert manager.hear() == {"STATUS": "b" * 500}


def test_without_a_manager_nothing_is_said_and_nothing_fails(monkeypatch):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notifier = Notifier.from_environment()
    assert not notifier.active
    notifier.ready("x")


def test_a_manager_that_went_away_is_one_line_in_the_log(tmp_path, caplog):
    notifier = Notifier(str(tmp_path / "gone"))
    notifier.alive()
    notifier.alive()
    assert [record.message for record in caplog.records] == [
        "the service manager cannot be told: [Errno 2] No such file or directory"
    ]


def test_a_manager_that_does_not_read_stops_nobody(tmp_path, caplog):
    with manager_at(tmp_path / "slow"):
        notifier = Notifier(str(tmp_path / "slow"))
        for _ in range(2000):  # more than any queue of datagrams holds: net.unix.max_dgram_qlen
            notifier.alive()
    assert not caplog.records


@pytest.mark.parametrize(
    ("usec", "pid", "seconds"),
    [
        ("30000000", None, 30.0),
        ("30000000", "ours", 30.0),
        ("30000000", "1", None),
        ("0", None, None),
        ("soon", None, None),
        (None, None, None),
    ],
)
def test_the_watchdogs_interval(monkeypatch, usec, pid, seconds):
    for name, value in (("WATCHDOG_USEC", usec), ("WATCHDOG_PID", str(os.getpid()) if pid == "ours" else pid)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert watchdog_s() == seconds
    assert "WATCHDOG_USEC" not in os.environ


@pytest.fixture
def handed_over(monkeypatch):
    """Put sockets where a service manager puts them, without touching this process's descriptors 3 and up."""

    def hand_over(*sockets, pid=None):
        first = os.dup(sockets[0].fileno()) if sockets else 3
        last = first
        for other in sockets[1:]:  # they must follow each other
            last += 1
            os.dup2(other.fileno(), last)
        monkeypatch.setattr(notify, "_FIRST_LISTENER", first)
        monkeypatch.setenv("LISTEN_FDS", str(len(sockets)))
        monkeypatch.setenv("LISTEN_PID", str(os.getpid() if pid is None else pid))
        monkeypatch.setenv("LISTEN_FDNAMES", "attach")
        return first

    return hand_over


def bound(path, kind=socket.SOCK_STREAM, *, listen=True):
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.bind(str(path))
    if listen:
        sock.listen()
    return sock


def test_a_socket_that_was_bound_ahead_is_taken_over(tmp_path, handed_over):
    path = tmp_path / "attach.sock"
    with bound(path) as theirs:
        handed_over(theirs)
        (tmp_path / "link").symlink_to(tmp_path)
        listener = choose_listener(take_listeners(), str(tmp_path / "link" / "attach.sock"))
        assert listener is not None
        with listener, socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            assert listener.gettimeout() == 0
            assert not os.get_inheritable(listener.fileno())
            listener.accept()[0].close()
        assert take_listeners() == [], "a second call gives nothing away"


def test_sockets_for_another_process_are_left_alone(tmp_path, handed_over):
    with bound(tmp_path / "a") as theirs:
        first = handed_over(theirs, pid=1)
        assert take_listeners() == []
        assert "LISTEN_FDS" not in os.environ
        os.close(first)


@pytest.mark.parametrize("wrong", ["path", "datagram", "not listening", "inet"])
def test_a_socket_of_another_kind_is_closed_and_named(tmp_path, handed_over, caplog, wrong):
    path = tmp_path / "attach.sock"
    match wrong:
        case "path":
            theirs = bound(tmp_path / "other.sock")
        case "datagram":
            theirs = bound(path, socket.SOCK_DGRAM, listen=False)
        case "not listening":
            theirs = bound(path, listen=False)
        case _:
            theirs = socket.create_server(("127.0.0.1", 0))
    with theirs:
        handed_over(theirs)
        taken = take_listeners()
        assert choose_listener(taken, str(path)) is None
        assert taken[0].fileno() == -1
    assert "see ListenStream= of its unit" in caplog.text


def test_a_name_on_which_somebody_listens_is_seen(tmp_path):
    path = tmp_path / "a b.sock"
    assert not notify.is_listened_on(str(path))
    (tmp_path / "link").symlink_to(tmp_path)
    with bound(path):
        assert notify.is_listened_on(str(path))
        assert notify.is_listened_on(str(tmp_path / "link" / "a b.sock"))
        assert not notify.is_listened_on(str(tmp_path / "a"))
    assert path.exists()
    assert not notify.is_listened_on(str(path)), "a dead listener's file"
    with bound(tmp_path / "datagram", socket.SOCK_DGRAM, listen=False):
        assert not notify.is_listened_on(str(tmp_path / "datagram"))


def test_of_two_fitting_sockets_one_is_taken(tmp_path, handed_over):
    with bound(tmp_path / "a") as theirs, socket.socket(fileno=os.dup(theirs.fileno())) as again:
        handed_over(theirs, again)
        taken = take_listeners()
        chosen = choose_listener(taken, str(tmp_path / "a"))
        assert chosen is taken[0]
        assert taken[1].fileno() == -1
        chosen.close()
