"""A client takes the socket of its own user and of root, and no stranger's."""

from __future__ import annotations

import os
import socket
from contextlib import contextmanager

import pytest
from support.mounts import need_root
from support.users import NOBODY

from ckptd.client.session import embedded
from ckptd.protocol.errors import DaemonUnavailable


@contextmanager
def listening(path, uid):
    """Listen as a user: the kernel tells a client who called listen(2)."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        os.seteuid(uid)
        try:
            listener.listen()
        finally:
            os.seteuid(0)
        yield


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The default place of this user's daemon, and none of the system's."""
    need_root("a stranger")
    monkeypatch.delenv("CKPTD_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(embedded, "runtime_dir", lambda: str(tmp_path))
    monkeypatch.setattr(embedded, "_SYSTEM_RUNTIME", str(tmp_path / "none"))
    return tmp_path


def attach():
    connection, place = embedded.open_attach_socket(timeout_s=1.0)
    connection.close()
    return place


def test_our_own_and_roots_are_taken(place):
    with listening(f"{place}/attach.sock", 0):
        assert attach() == str(place)


def test_a_strangers_is_refused(place):
    with listening(f"{place}/attach.sock", NOBODY), pytest.raises(DaemonUnavailable) as caught:
        attach()
    assert str(caught.value) == (
        f"no ckptd daemon at {place}: uid {NOBODY} listens there, who is a stranger; set CKPTD_RUNTIME_DIR"
    )


def test_a_place_that_was_named_is_taken_as_it_is(place, monkeypatch):
    monkeypatch.setenv("CKPTD_RUNTIME_DIR", str(place))
    with listening(f"{place}/attach.sock", NOBODY):
        assert attach() == str(place)
