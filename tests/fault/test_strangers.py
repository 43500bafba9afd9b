"""Whoever is not a client of this daemon is told so, counted, and harms nobody."""

import os
import socket
import struct
from contextlib import suppress

import msgspec
import pytest
import zmq
from support.clients import assert_holds
from support.memory import ABSENT, SERVED
from support.mounts import need_root
from support.processes import stopped
from support.trainers import TrainerRaised
from support.trees import below
from support.waiting import wait_until

from ckptd.protocol import messages
from ckptd.protocol.messages import PROTOCOL_VERSION, Attach, Fenced, Heartbeat, Refused
from ckptd.protocol.retained import OpenRetained, RetainedClosed, RetainedOpened

NOBODY = 65534


@pytest.fixture
def dealer(daemon):
    """A ZeroMQ socket that is connected to the daemon without a session."""
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RCVTIMEO, 10_000)
    socket.connect(f"ipc://{daemon.runtime.path}/messages.sock")
    yield socket
    socket.close()
    context.term()


def attach_connection(daemon):
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(10)
    connection.connect(f"{daemon.runtime.path}/attach.sock")
    return connection


def ask(connection, frame):
    """Send an attach frame and return the decoded answer."""
    connection.sendall(struct.pack("<I", len(frame)) + frame)
    (length,) = struct.unpack("<I", connection.recv(4, socket.MSG_WAITALL))
    return messages.decode_attach_reply(connection.recv(length, socket.MSG_WAITALL))


def rejected(daemon, reason):
    return daemon.metric(f'ckptd_rejected_messages_total{{reason="{reason}"}}')


def test_a_wrong_token_is_answered_and_counted(daemon, dealer):
    dealer.send_multipart([b"x" * 32, messages.encode(Heartbeat())])
    answer = messages.decode_daemon_message(dealer.recv())
    assert isinstance(answer, Fenced)
    assert answer.error.code == "wrong_token"
    assert rejected(daemon, "token") == 1


def test_another_sessions_token_opens_no_other_slots(daemon, dealer, trainers, tmp_path):
    """A rank that names an arena which its session does not have is refused; the arena's owner is not disturbed."""
    trainer = trainers.start()
    trainer.do("session = dcp.connect()\ndcp.save(state(), checkpoint_id=path)", path=str(tmp_path / "a"))
    other = trainers.start()
    other.do("session = dcp.connect()\ndcp.save(state(), checkpoint_id=path)", path=str(tmp_path / "b"))
    token = other.get("session._link.attached.token")
    seal = messages.Sealed(
        sequence=2, checkpoint_id=str(tmp_path / "c"), digest="d", arena=1, slot=0, control_bytes=8192,
        image_bytes=4096, object_bytes=b"", plan_s=0.0, stage_s=0.0, stall_s=0.0,
    )  # fmt: skip
    dealer.send_multipart([token, messages.encode(seal)])
    assert "this session does not have" in str(messages.decode_daemon_message(dealer.recv()).error.facts)
    trainer.do("dcp.save(state(value=2.0), checkpoint_id=path)", path=str(tmp_path / "a"))
    assert_holds(tmp_path / "a", value=2.0)
    assert not (tmp_path / "c").exists()


def test_garbage_on_the_message_socket_harms_no_save_in_flight(daemon, dealer, trainers, tmp_path):
    trainer = trainers.start()
    trainer.do("session = dcp.connect()\ndcp.save(state(), checkpoint_id=path)", path=str(tmp_path / "a"))
    token = trainer.get("session._link.attached.token")
    with stopped(*daemon.workers()):
        trainer.do("future = dcp.async_save(state(value=2.0), checkpoint_id=path)", path=str(tmp_path / "b"))
        frames = [
            [b""],
            [b"\x00" * 1000] * 5,
            [os.urandom(32), os.urandom(4096)],
            [token, b""],
            [token, os.urandom(100)],
            [token, msgspec.msgpack.encode({"type": "sealed", "sequence": -1})],
            [token, msgspec.msgpack.encode({"type": "propose", "sequence": "one"})],
            [token, b"\x80\x04\x95cos\nsystem\n(S'touch /tmp/owned'\ntR."],  # a pickle
        ]
        for parts in frames:
            dealer.send_multipart(parts)
            assert isinstance(messages.decode_daemon_message(dealer.recv()), Fenced)
    assert trainer.get("outcome(future)") == "committed"
    assert rejected(daemon, "garbage") + rejected(daemon, "token") == len(frames)
    assert not os.path.exists("/tmp/owned")
    assert_holds(tmp_path / "b", value=2.0)


@pytest.mark.parametrize("answered", [True, False])
@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<I", 0),
        struct.pack("<I", 5) + b"\xff\xfe\x00\x01\x02",
        struct.pack("<I", 1 << 31),
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        struct.pack("<I", 100) + b"cut short",
    ],
    ids=["empty", "binary", "too long", "http", "cut short"],
)
def test_garbage_on_the_attach_socket_ends_that_connection_only(daemon, data, answered):
    with attach_connection(daemon) as connection:
        connection.sendall(data)
        if answered:
            connection.shutdown(socket.SHUT_WR)
            with suppress(ConnectionResetError):  # it need not read to the end what is not ours
                while connection.recv(4096):
                    pass
    with attach_connection(daemon) as connection:
        assert ask(connection, messages.encode(Attach(PROTOCOL_VERSION, "job", 0, 1))).token


def test_garbage_on_the_attach_socket_is_counted(daemon):
    with attach_connection(daemon) as connection:
        answer = ask(connection, b"\xff\xfe\x00\x01\x02")
    assert isinstance(answer, Refused)
    assert answer.error.code == "bad_message"
    assert rejected(daemon, "garbage") == 1


@pytest.mark.parametrize(("version", "older"), [(0, "client"), (PROTOCOL_VERSION + 1, "daemon")])
def test_another_version_of_the_protocol_is_refused_with_what_to_do(daemon, version, older):
    frame = msgspec.msgpack.encode({"type": "attach", "protocol": version, "of_that_version": [1, 2]})
    with attach_connection(daemon) as connection:
        answer = ask(connection, frame)
    assert isinstance(answer, Refused)
    assert answer.error.code == "protocol_mismatch"
    assert answer.error.facts == {"client": version, "daemon": PROTOCOL_VERSION}
    assert rejected(daemon, "protocol") == 1
    from ckptd.protocol.errors import from_report

    assert f"upgrade the {older}" in str(from_report(answer.error))


def test_a_strangers_uid_is_refused_with_both_uids(daemon, trainers):
    need_root("another user's process")
    os.chmod(daemon.runtime.path, 0o711)  # even where the owner opened the way
    os.chmod(f"{daemon.runtime.path}/attach.sock", 0o666)
    stranger = trainers.start(uid=NOBODY)
    with pytest.raises(TrainerRaised) as caught:
        stranger.do("dcp.connect()")
    assert caught.value.kind == "Forbidden"
    assert f"uid {NOBODY} may not use the daemon of uid {os.geteuid()}" in caught.value.text
    assert rejected(daemon, "uid") == 1


def test_a_stranger_does_not_reach_the_sockets_at_all(daemon, trainers):
    need_root("another user's process")
    stranger = trainers.start(uid=NOBODY)
    with pytest.raises(TrainerRaised) as caught:
        stranger.do("dcp.connect()")
    assert caught.value.kind == "DaemonUnavailable"
    assert "Permission denied" in caught.value.text
    assert daemon.runtime.path in caught.value.text


def test_a_foreign_runtime_directory_is_not_used(runtime, trainers):
    """Who owns the directory of the sockets could stand in for the daemon."""
    need_root("another user's directory")
    os.chown(runtime.path, NOBODY, NOBODY)
    trainer = trainers.start(CKPTD_EMBEDDED="1")
    with pytest.raises(TrainerRaised) as caught:
        trainer.do("dcp.connect(connect_timeout_s=10)")
    assert caught.value.kind == "DaemonUnavailable"
    assert runtime.path in caught.value.text


def test_arenas_are_for_their_owner_alone(daemon, trainers, tmp_path):
    trainer = trainers.start()
    trainer.do("dcp.save(state(), checkpoint_id=path)", path=str(tmp_path / "a"))
    arenas = below(daemon.runtime.arenas, "*.arena")
    assert arenas
    assert {arena.stat().st_mode & 0o777 for arena in arenas} == {0o600}
    assert {arena.parent.stat().st_mode & 0o777 for arena in arenas} == {0o700}
    wait_until(lambda: daemon.metric("ckptd_sessions") == 1, "one session")


def test_a_load_that_was_never_begun_cannot_end_and_is_not_counted(daemon):
    with attach_connection(daemon) as connection:
        nothing = ask(connection, messages.encode(OpenRetained(PROTOCOL_VERSION, "/runs/7", "no such save")))
        assert nothing == RetainedOpened([])
        answer = ask(connection, messages.encode(RetainedClosed(PROTOCOL_VERSION, "served", 2**60)))
        assert isinstance(answer, Refused)
    assert daemon.metric(SERVED) == 0
    assert daemon.metric(ABSENT) == 1
    with attach_connection(daemon) as connection:
        answer = ask(connection, messages.encode(OpenRetained(PROTOCOL_VERSION + 1, "/runs/7", "save")))
        assert answer.error.code == "protocol_mismatch"
