"""Which settings change while the daemon runs, and how people hear of it."""

from __future__ import annotations

import pytest

from ckptd.daemon.settings.config import Config
from ckptd.daemon.settings.reload import LIVE, apply


def test_every_live_setting_exists():
    assert set(Config.__struct_fields__) > LIVE


def test_what_may_change_is_seen_by_whoever_holds_the_configuration():
    running = Config()
    held = running
    done = apply(running, Config(write_threads=7, stop_timeout_s=5.0))
    assert (held.write_threads, held.stop_timeout_s) == (7, 5.0)
    assert done.changed == ("write_threads", "stop_timeout_s")
    assert str(done) == "changed write_threads, stop_timeout_s"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("http", "127.0.0.1:0"),
        ("shm_dir", "/mnt"),
        ("heartbeat_s", 1.0),
        ("session_timeout_s", 9.0),
        ("user_code", True),
    ],
)
def test_what_was_given_away_already_waits_for_a_restart(name, value):
    running = Config()
    done = apply(running, Config(**{name: value}))
    assert running == Config()
    assert (done.changed, done.waiting) == ((), (name,))
    assert str(done) == f"nothing changed; restart needed for {name}"


def test_nothing_new_is_said_so():
    assert str(apply(Config(), Config())) == "nothing changed"
