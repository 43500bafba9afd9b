"""A daemon may answer anything, or nothing: a load is never held up, and no descriptor is left open."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time

import numpy as np
import pytest
from xxhash import xxh3_64_intdigest

from ckptd.checkpoint.reading.read import Read, ReadCount
from ckptd.client.loading import retained
from ckptd.client.loading.retained import open_retained
from ckptd.protocol.errors import Forbidden
from ckptd.protocol.messages import PROTOCOL_VERSION, Refused, decode_attach_request, encode
from ckptd.protocol.retained import OpenRetained, RetainedClosed, RetainedImage, RetainedOpened
from ckptd.staging.arena import SlotState, create_arena, slot_offset, write_slot_state

SLOT_BYTES = 8 * 4096
DATA = bytes(range(256)) * 32
FILE = "__0_0.distcp"
IMAGE = RetainedImage(FILE, 1, 7, slot_offset(1, SLOT_BYTES) + 4096, len(DATA))
_LENGTH = struct.Struct("<I")


def framed(message):
    frame = encode(message)
    return _LENGTH.pack(len(frame)) + frame


class Daemon:
    """Answers one connection with the frames and descriptors that it is given."""

    def __init__(self, runtime):
        self.runtime = str(runtime)
        self.heard = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(f"{runtime}/attach.sock")
        self._listener.listen()
        self._thread = None

    def answer(self, data, descriptors=()):
        self._thread = threading.Thread(target=self._serve, args=(data, list(descriptors)))
        self._thread.start()

    def _serve(self, data, descriptors):
        connection, _ = self._listener.accept()
        with connection:
            self._hear(connection)
            if data is not None:
                socket.send_fds(connection, [data or b""], descriptors)
            if data:
                self._hear(connection)

    def _hear(self, connection):
        head = connection.recv(_LENGTH.size, socket.MSG_WAITALL)
        if head:
            [length] = _LENGTH.unpack(head)
            self.heard.append(decode_attach_request(connection.recv(length, socket.MSG_WAITALL)))

    def close(self):
        if self._thread is not None:
            self._thread.join(10)
        self._listener.close()


@pytest.fixture
def daemon(tmp_path, monkeypatch):
    monkeypatch.setattr(retained, "ANSWER_WITHIN_S", 5.0)
    monkeypatch.setenv("CKPTD_RUNTIME_DIR", str(tmp_path))
    daemon = Daemon(tmp_path)
    yield daemon
    daemon.close()


@pytest.fixture
def arena(tmp_path):
    """An arena whose second slot holds an image."""
    descriptor = create_arena(str(tmp_path / "arena"), slots=2, slot_bytes=SLOT_BYTES)
    os.pwrite(descriptor, DATA, IMAGE.offset)
    write_slot_state(descriptor, 1, SlotState.RETAINED, 7)
    yield descriptor
    os.close(descriptor)


@pytest.fixture(autouse=True)
def no_descriptor_is_left_open():
    """Set up before the others and torn down after them."""
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


def reads(target, **options):
    return [Read(f"/run/a/{FILE}", 0, len(DATA), np.frombuffer(target, np.uint8).ctypes.data, "w", **options)]


def test_what_a_daemon_holds_is_read_and_told(daemon, arena):
    daemon.answer(framed(RetainedOpened([IMAGE])), [arena])
    save = open_retained("/run/a", "save")
    assert save.name == "memory"
    target = bytearray(len(DATA))
    count = save.read(reads(target, expected_hash=xxh3_64_intdigest(DATA)))
    assert (count, bytes(target)) == (ReadCount(len(DATA), len(DATA)), DATA)
    daemon.close()
    opened = OpenRetained(PROTOCOL_VERSION, "/run/a", "save")
    assert daemon.heard == [opened, RetainedClosed(PROTOCOL_VERSION, "served", len(DATA))]


@pytest.mark.parametrize(
    ("what", "outcome"),
    [
        *(("state", "overwritten"), ("sequence", "overwritten"), ("both", "overwritten")),
        *(("hash", "damaged"), ("file", "damaged")),
    ],
)
def test_what_does_not_count_is_not_handed_on_and_told(daemon, arena, what, outcome, caplog):
    daemon.answer(framed(RetainedOpened([IMAGE])), [arena])
    save = open_retained("/run/a", "save")
    target = bytearray(len(DATA))
    wanted = reads(target, expected_hash=1 if what in {"hash", "both"} else None)
    if what in {"state", "both"}:
        write_slot_state(arena, 1, SlotState.STAGING, 8)
    elif what == "sequence":
        write_slot_state(arena, 1, SlotState.RETAINED, 9)
    elif what == "file":
        wanted[0].file = "/run/a/__1_0.distcp"
    with caplog.at_level("INFO", "ckptd.client.loading.retained"):
        assert save.read(wanted) is None
    daemon.close()
    assert daemon.heard[1] == RetainedClosed(PROTOCOL_VERSION, outcome, 0)
    assert "from the disk" in caplog.text


@pytest.mark.parametrize(
    "answer",
    [
        framed(RetainedOpened([])),
        framed(RetainedOpened([IMAGE])),
        framed(RetainedOpened([IMAGE, IMAGE])),
        framed(Refused(Forbidden(1, 2).report())),
        framed(RetainedOpened([IMAGE]))[:-1],
        _LENGTH.pack(1 << 30),
        _LENGTH.pack(3) + b"\xc1\xc1\xc1",
        b"\x01",
        None,
    ],
    ids=["nothing", "no descriptor", "two images", "refused", "cut", "endless", "garbage", "a byte", "silence"],
)
@pytest.mark.parametrize("descriptors", [0, 1], ids=["", "descriptor"])
def test_any_other_answer_is_none(daemon, arena, answer, descriptors, monkeypatch):
    monkeypatch.setattr(retained, "ANSWER_WITHIN_S", 0.05)
    good = answer == framed(RetainedOpened([IMAGE])) and descriptors
    daemon.answer(answer, [arena] * (descriptors + bool(good)))
    assert open_retained("/run/a", "save") is None


def test_memory_of_another_user_is_not_trusted(daemon, arena, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    daemon.answer(framed(RetainedOpened([IMAGE])), [arena])
    assert open_retained("/run/a", "save") is None


def test_a_daemon_that_hangs_is_waited_for_a_moment(daemon, monkeypatch):
    monkeypatch.setattr(retained, "ANSWER_WITHIN_S", 0.05)
    begun = time.monotonic()
    assert open_retained("/run/a", "save") is None  # nobody accepts
    assert time.monotonic() - begun >= 0.05


@pytest.mark.parametrize("runtime", [None, "no/such/place"])
def test_where_no_daemon_is_nobody_is_asked(monkeypatch, tmp_path, runtime):
    monkeypatch.setenv("CKPTD_RUNTIME_DIR", str(tmp_path / "empty"))
    assert open_retained("/run/a", "save", runtime=runtime and str(tmp_path / runtime)) is None
    assert not (tmp_path / "empty").exists()


def test_a_place_that_cannot_be_is_no_error(monkeypatch):
    monkeypatch.setenv("CKPTD_RUNTIME_DIR", "/" + "x" * 200)
    assert open_retained("/run/a", "save") is None


def test_a_path_that_is_no_unicode_is_asked_for_all_the_same(daemon):
    daemon.answer(framed(RetainedOpened([])))
    assert open_retained(os.fsdecode(b"/run/\xff"), "save") is None
    daemon.close()
    assert [request.save_id for request in daemon.heard] == ["save"]
