import os

import pytest

from ckptd.protocol.errors import BadConfig
from ckptd.protocol.paths import (
    SOCKET_PATH_BYTES,
    attach_socket,
    http_address_file,
    message_endpoint,
    runtime_dir,
    state_dir,
)

VARIABLES = ("CKPTD_RUNTIME_DIR", "CKPTD_STATE_DIR", "XDG_RUNTIME_DIR", "XDG_STATE_HOME")


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", "/home/ann")


@pytest.fixture
def root(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)


@pytest.fixture
def ann(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1001)


def test_root_uses_the_system_directories(root, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/0")
    monkeypatch.setenv("XDG_STATE_HOME", "/root/state")
    assert (runtime_dir(), state_dir()) == ("/run/ckptd", "/var/lib/ckptd")


def test_a_user_uses_the_session_directories(ann, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1001/")
    monkeypatch.setenv("XDG_STATE_HOME", "/data/state")
    assert (runtime_dir(), state_dir()) == ("/run/user/1001/ckptd", "/data/state/ckptd")


def test_a_user_without_a_session_gets_directories_of_his_own(ann):
    assert (runtime_dir(), state_dir()) == ("/tmp/ckptd-1001", "/home/ann/.local/state/ckptd")


def test_relative_xdg_directories_are_ignored(ann, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", "run")
    monkeypatch.setenv("XDG_STATE_HOME", "state")
    assert (runtime_dir(), state_dir()) == ("/tmp/ckptd-1001", "/home/ann/.local/state/ckptd")


@pytest.mark.parametrize("who", ["root", "ann"])
def test_our_own_variables_come_first(request, monkeypatch, who):
    request.getfixturevalue(who)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1001")
    monkeypatch.setenv("CKPTD_RUNTIME_DIR", "/a/run/")
    monkeypatch.setenv("CKPTD_STATE_DIR", "/a/state")
    assert (runtime_dir(), state_dir()) == ("/a/run", "/a/state")


def test_a_relative_directory_is_made_absolute(ann, monkeypatch, tmp_path):
    monkeypatch.chdir("/")
    monkeypatch.setenv("CKPTD_RUNTIME_DIR", "run")
    monkeypatch.setenv("CKPTD_STATE_DIR", "state")
    assert (runtime_dir(), state_dir()) == ("/run", "/state")


def test_the_sockets_lie_in_the_runtime_directory():
    assert attach_socket("/r") == "/r/attach.sock"
    assert message_endpoint("/r") == "ipc:///r/messages.sock"
    assert http_address_file("/r") == "/r/http"


def test_the_longest_directory_still_gives_a_bindable_socket(ann, monkeypatch):
    longest = "/" + "x" * (SOCKET_PATH_BYTES - len("/messages.sock") - 1)
    monkeypatch.setenv("CKPTD_RUNTIME_DIR", longest)
    assert len(message_endpoint(runtime_dir()).removeprefix("ipc://")) == SOCKET_PATH_BYTES
    monkeypatch.setenv("CKPTD_RUNTIME_DIR", longest + "x")
    with pytest.raises(BadConfig, match="set CKPTD_RUNTIME_DIR to a shorter directory"):
        runtime_dir()
