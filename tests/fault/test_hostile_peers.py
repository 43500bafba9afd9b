"""While a save is in flight, peers send damaged and endless things to every socket: the save commits all the same."""

import os
import socket
import struct
from contextlib import contextmanager, suppress

import psutil
import pytest
import zmq
from support.clients import assert_holds
from support.messages import SAMPLES
from support.mutations import mutated
from support.processes import stopped
from support.waiting import wait_until

from ckptd.protocol import messages
from ckptd.protocol.messages import Detach

MIB = 1 << 20
# What all of it may cost the daemon; one message that was believed would cost more.
GROWTH_BYTES = 48 * MIB
ATTACH = [messages.encode(each) for each in SAMPLES[messages.decode_attach_request]]
CLIENT = [messages.encode(each) for each in SAMPLES[messages.decode_client_message] if not isinstance(each, Detach)]
# ZMTP 3.1: signature, version, mechanism NULL; then a READY command, and a frame that announces its length in 8 bytes.
GREETING = b"\xff" + b"\0" * 8 + b"\x7f\3\1" + b"NULL".ljust(20, b"\0") + b"\0" * 32
READY = b"\4\x29\5READY\x0bSocket-Type\0\0\0\6DEALER\x08Identity\0\0\0\0"


@pytest.fixture
def in_flight(daemon, trainers, tmp_path):
    """Keep a sealed save waiting while a block runs, then see it committed; hand on a second job's token."""

    @contextmanager
    def around():
        saver, other = trainers.start(), trainers.start()
        for trainer in (saver, other):
            trainer.do("session = dcp.connect()\ndcp.save(state(), checkpoint_id=path)", path=str(tmp_path / "warm"))
        token = other.get("session._link.attached.token")
        before = psutil.Process(daemon.pid).memory_info().rss
        with stopped(*daemon.workers(2)):
            saver.do("future = dcp.async_save(state(value=2.0), checkpoint_id=path)", path=str(tmp_path / "a"))
            daemon.wait_for_save(tmp_path / "a", lambda save: save["state"] == "staged")
            yield token
            assert daemon.get("/healthz")[0] == 200
            assert psutil.Process(daemon.pid).memory_info().rss - before < GROWTH_BYTES
            assert daemon.generations()  # it answers, and the save is still there
        assert saver.get("outcome(future)") == "committed"
        assert_holds(tmp_path / "a", value=2.0)
        saver.do("dcp.save(state(value=3.0), checkpoint_id=path)", path=str(tmp_path / "a"))
        assert_holds(tmp_path / "a", value=3.0)

    return around


def connect(path):
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(10)
    connection.connect(path)
    return connection


def rejected(daemon):
    return sum(
        float(line.rpartition(" ")[2])
        for line in daemon.get("/metrics")[1].splitlines()
        if line.startswith("ckptd_rejected_messages_total{")
    )


def test_damaged_attach_frames(daemon, in_flight):
    with in_flight():
        for seed in range(150):
            frame = mutated(ATTACH, seed)
            with connect(f"{daemon.runtime.path}/attach.sock") as connection:
                connection.sendall(struct.pack("<I", len(frame)) + frame)
                connection.shutdown(socket.SHUT_WR)
                with suppress(ConnectionResetError):
                    while connection.recv(1 << 16):
                        pass
        assert rejected(daemon) > 75


def test_connections_that_never_end_their_frame(daemon, in_flight):
    begun = [b"", b"\0", struct.pack("<I", 60_000), struct.pack("<I", 1000) + b"x" * 999]
    with in_flight():
        kept = [connect(f"{daemon.runtime.path}/attach.sock") for _ in range(100)]
        for number, connection in enumerate(kept):
            connection.sendall(begun[number % len(begun)])
        kept += [connect(f"{daemon.runtime.path}/messages.sock") for _ in range(50)]
        for connection in kept[100:]:
            connection.sendall(GREETING[:20])
    for connection in kept:
        connection.close()


def test_damaged_messages_with_a_good_token(daemon, in_flight):
    """Whoever may speak for one job does no harm to another."""
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, 0)
    dealer.connect(f"ipc://{daemon.runtime.path}/messages.sock")
    try:
        with in_flight() as token:
            for seed in range(400):
                dealer.send_multipart([token, mutated(CLIENT, seed)])
            wait_until(lambda: rejected(daemon) > 200, "the refusal of most of them")
    finally:
        dealer.close()
        context.term()


@pytest.mark.parametrize("nbytes", [1 << 31, 1 << 40, (1 << 63) - 1, (1 << 64) - 1])
def test_a_message_that_announces_more_than_there_is(daemon, in_flight, nbytes):
    with in_flight(), connect(f"{daemon.runtime.path}/messages.sock") as connection:
        connection.sendall(GREETING + READY)
        assert connection.recv(64)[:1] == b"\xff"
        connection.sendall(b"\2" + struct.pack(">Q", nbytes) + b"x" * 4096)
        with suppress(ConnectionError):
            while connection.recv(1 << 16):  # the daemon's READY, then the end: it is not read on
                pass


def test_bytes_that_are_no_zmq(daemon, in_flight):
    with in_flight():
        for data in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(5000), GREETING + os.urandom(500), GREETING + READY[::-1]):
            with connect(f"{daemon.runtime.path}/messages.sock") as connection, suppress(ConnectionError):
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(1 << 16):
                    pass
