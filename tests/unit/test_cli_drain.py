"""`ckptd drain` against daemons that answer in odd ways."""

from __future__ import annotations

import json
import socket
import struct
import threading
from contextlib import contextmanager

import pytest

from ckptd.daemon.cli import drain as module
from ckptd.protocol import messages
from ckptd.protocol.errors import Forbidden


@pytest.fixture
def runtime(tmp_path, monkeypatch):
    monkeypatch.setenv("CKPTD_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(module, "fetch_status", lambda _: b'{"jobs": []}')
    monkeypatch.setattr(module, "_ANSWER_S", 0.05)
    monkeypatch.setattr(module, "_LOOK_S", 0.01)
    return tmp_path


@contextmanager
def daemon(runtime, reply):
    """Take one order and send ``reply``, a message or raw bytes; None keeps silent until the end."""
    orders, done = [], threading.Event()

    def serve(listener):
        connection, _ = listener.accept()
        with connection:
            head = connection.recv(4, socket.MSG_WAITALL)
            orders.append(messages.decode_attach_request(connection.recv(struct.unpack("<I", head)[0])))
            if reply is None:
                done.wait(10)
                return
            frame = reply if isinstance(reply, bytes) else messages.encode(reply)
            connection.sendall(frame if isinstance(reply, bytes) else struct.pack("<I", len(frame)) + frame)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(runtime / "attach.sock"))
        listener.listen()
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        try:
            yield orders
        finally:
            done.set()
            thread.join()


def test_the_order_carries_time_and_version(run_cli, runtime):
    with daemon(runtime, messages.Drained(0, 7)) as orders:
        code, out, err = run_cli("drain", "--timeout", "5")
    assert (code, err) == (0, "")
    assert orders == [messages.Drain(messages.PROTOCOL_VERSION, 5.0)]
    assert out.startswith("daemon pid 7 is drained")


@pytest.mark.parametrize("as_json", [False, True])
def test_saves_that_are_left_are_1(run_cli, runtime, as_json):
    with daemon(runtime, messages.Drained(2, 7)):
        code, out, err = run_cli("drain", *(["--json"] if as_json else []))
    assert code == 1
    if as_json:
        assert json.loads(out) == {"drained": False, "unfinished": 2, "pid": 7}
    else:
        assert err == "ckptd: 2 saves are unfinished after 60 s; see `ckptd status`\n"


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (messages.Refused(Forbidden(7, 0).report()), str(Forbidden(7, 0))),
        (messages.ArenaOpened(1, 1, 4096), "ArenaOpened in answer to Drain"),
        (struct.pack("<I", 3) + b"\xff\xff\xff", "not a ckptd message"),
        (struct.pack("<I", 100) + b"cut", "closed the connection (end of file)"),
        (b"", "closed the connection (end of file)"),
    ],
)
def test_odd_answers_are_one_line(run_cli, runtime, reply, said):
    with daemon(runtime, reply):
        code, out, err = run_cli("drain", "--timeout", "0")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert said in err


def test_silence_has_an_end(run_cli, runtime):
    with daemon(runtime, None):
        code, _, err = run_cli("drain", "--timeout", "0")
    assert code == 1
    assert "it did not answer; see its log" in err


def test_progress_counts_the_saves_in_flight(monkeypatch):
    saves = [
        {"state": "staged", "bytes_done": 3, "bytes_total": 10},
        {"state": "committing", "bytes_done": 10, "bytes_total": 10},
        {"state": "committed", "bytes_done": 99, "bytes_total": 99},
    ]
    monkeypatch.setattr(module, "fetch_status", lambda _: json.dumps({"jobs": [{"generations": saves}]}).encode())
    assert module._bytes_left("/r") == (13, 20)


def test_a_terminal_sees_progress(run_cli, runtime, monkeypatch):
    drawn = []

    @contextmanager
    def bar(title):
        yield lambda done, total: drawn.append((title, done, total))

    monkeypatch.setattr(module, "progress_bar", bar)
    monkeypatch.setattr(module, "_bytes_left", lambda _: (1, 2))
    with daemon(runtime, None):
        run_cli("drain", "--timeout", "0")
    assert drawn
    assert set(drawn) == {("drain", 1, 2)}
