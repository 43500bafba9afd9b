"""The files that make ckptd a service: where they go, what stands in them, that the sample says what is true."""

from __future__ import annotations

import tempfile
import tomllib
from pathlib import Path

import pytest

from ckptd.daemon.settings.config import Config, _checked
from ckptd.daemon.settings.reload import LIVE
from ckptd.daemon.settings.sample import meanings, sample_config
from ckptd.daemon.systemd.units import Layout, closed_directories, interpreter_of, planned, render, shipped

SHIPPED = Path(__file__).parents[2] / "systemd"
ODD = '/opt/a b/100%/"x"/$HOME/python\\3'


def test_the_shipped_sample_is_made_from_the_settings():
    remedy = "run `.venv/bin/python -m ckptd.daemon.settings.sample > systemd/ckptd.toml`"
    assert (SHIPPED / "ckptd.toml").read_text() == sample_config(), remedy
    assert shipped("ckptd.toml") == sample_config()


def test_the_sample_shows_every_setting_with_meaning_and_default():
    assert set(meanings()) == set(Config.__struct_fields__)
    lines = sample_config().splitlines()
    shown = tomllib.loads("\n".join(line[1:] for line in lines if line[:1] == "#" and line[1:2].isalpha()))
    defaults = Config()
    known = {name: getattr(defaults, name) for name in Config.__struct_fields__}
    assert shown == {name: list(value) if isinstance(value, tuple) else value for name, value in known.items()}
    assert _checked("sample", shown) == defaults
    assert tomllib.loads(sample_config()) == {}, "as it comes, the sample sets nothing"


@pytest.mark.parametrize("name", Config.__struct_fields__)
def test_the_sample_says_what_a_reload_cannot_change(name):
    text = sample_config()
    [paragraph] = [part for part in text.split("\n\n") if f"#{name} = " in part]
    assert paragraph.splitlines()[-2].endswith("(restart)") == (name not in LIVE)


def test_a_sample_may_make_settings():
    assert tomllib.loads(sample_config({"http": "127.0.0.1:0"})) == {"http": "127.0.0.1:0"}


def test_the_systems_files_and_their_places():
    files = planned(Layout(False), python="/opt/ckptd/bin/python", systemd=252)
    assert [file.path for file in files] == [
        "/etc/systemd/system/ckptd.service",
        "/etc/systemd/system/ckptd.socket",
        "/etc/systemd/system/ckptd.slice",
        "/etc/sysusers.d/ckptd.conf",
        "/etc/tmpfiles.d/ckptd.conf",
        "/etc/ckptd/ckptd.toml",
    ]
    assert [file.keep for file in files] == [False] * 5 + [True]
    assert '\nExecStart="/opt/ckptd/bin/python" -P -m ckptd.daemon --mode system\n' in files[0].text
    assert not [file.path for file in files if "@" in file.text.replace("SystemCallFilter=@system-service", "")]


def test_a_users_files_and_their_places():
    files = planned(Layout(True, config_home="/home/a/.config"), python="/p", systemd=252)
    assert [file.path for file in files] == [
        "/home/a/.config/systemd/user/ckptd.service",
        "/home/a/.config/systemd/user/ckptd.socket",
        "/home/a/.config/ckptd/ckptd.toml",
    ]
    assert '\nExecStart="/p" -P -m ckptd.daemon --mode user\n' in files[0].text
    assert tomllib.loads(files[-1].text) == {"http": "127.0.0.1:0"}, "users of one node do not fight for a port"


@pytest.mark.parametrize(
    ("layout", "units", "entries", "config"),
    [
        (Layout(False, root="/img"), "/img/etc/systemd/system", "/img/etc/sysusers.d", "/img/etc/ckptd/ckptd.toml"),
        (Layout(False, prefix="/usr"), "/usr/lib/systemd/system", "/usr/lib/sysusers.d", "/etc/ckptd/ckptd.toml"),
        (
            Layout(False, "/img", "/usr"),
            "/img/usr/lib/systemd/system",
            "/img/usr/lib/sysusers.d",
            "/img/etc/ckptd/ckptd.toml",
        ),
    ],
)
def test_other_roots_and_prefixes(layout, units, entries, config):
    paths = {file.path for file in planned(layout, python="/p", systemd=252)}
    assert {f"{units}/ckptd.service", f"{entries}/ckptd.conf", config} <= paths


def test_an_odd_interpreter_is_quoted_and_found_again():
    text = render(shipped("ckptd.service"), python=ODD, systemd=252)
    assert interpreter_of(text) == ODD
    assert "100%%" in text
    assert interpreter_of("ExecStart=/usr/bin/python3 -m x\n") == "/usr/bin/python3"
    assert interpreter_of("[Service]\n") is None


@pytest.mark.parametrize("name", ["ckptd.service", "user/ckptd.service"])
@pytest.mark.parametrize(("systemd", "kind"), [(0, "notify"), (252, "notify"), (253, "notify-reload")])
def test_the_reload_that_this_systemd_knows(name, systemd, kind):
    lines = render(shipped(name), python="/p", systemd=systemd).splitlines()
    assert f"Type={kind}" in lines
    assert ("ExecReload=/bin/kill -HUP $MAINPID" in lines) == (kind == "notify")


def test_every_capability_that_is_kept_is_explained():
    text = shipped("ckptd.service")
    [kept] = [line.partition("=")[2].split() for line in text.splitlines() if line.startswith("CapabilityBoundingSet=")]
    comments = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    assert len(kept) == 5
    assert all(name in comments for name in kept)


@pytest.mark.parametrize("name", ["ckptd.service", "user/ckptd.service"])
def test_stopping_may_take_as_long_as_the_saves_may(name):
    lines = shipped(name).splitlines()
    [timeout] = [int(line.partition("=")[2]) for line in lines if line.startswith("TimeoutStopSec=")]
    assert timeout > Config().stop_timeout_s


def test_directories_that_are_closed_to_others_are_named():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # pytest's own lie in a closed one
        Path(folder).chmod(0o755)
        inner = Path(folder, "closed", "open", "bin")
        inner.mkdir(parents=True)
        closed = Path(folder, "closed")
        closed.chmod(0o700)
        assert closed_directories([str(inner), str(inner / "python"), str(closed)]) == [str(closed)]
        Path(folder, "link").symlink_to(inner)
        assert closed_directories([f"{folder}/link"]) == [str(closed)]
        closed.chmod(0o711)
        assert closed_directories([str(inner)]) == []
