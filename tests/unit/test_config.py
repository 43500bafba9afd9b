import json

import pytest

from ckptd.daemon.settings.config import Config, default_config_path, load_config, parse_address
from ckptd.protocol.errors import BY_CODE, BadConfig, from_report


@pytest.fixture
def write(tmp_path, monkeypatch):
    def write(text):
        path = tmp_path / "ckptd.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        monkeypatch.setenv("CKPTD_CONFIG", str(path))
        return path

    return write


@pytest.mark.parametrize("value", [None, ""])
def test_no_file_named_means_defaults(monkeypatch, value):
    monkeypatch.delenv("CKPTD_CONFIG", raising=False)
    if value is not None:
        monkeypatch.setenv("CKPTD_CONFIG", value)
    assert load_config() == Config()


def test_defaults_are_within_their_own_bounds(write):
    values = {name: getattr(Config(), name) for name in Config.__struct_fields__}
    write("\n".join(f"{name} = {json.dumps(value)}" for name, value in values.items()))
    assert load_config() == Config()


def test_what_the_file_sets_is_taken(write):
    write('http = "[::1]:0"\nworkers_per_job = 64\nheartbeat_s = 1\n')
    config = load_config()
    assert (config.http, config.workers_per_job, config.heartbeat_s) == ("[::1]:0", 64, 1.0)
    assert config.write_threads == Config().write_threads


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("workers_per_job = 0", "workers_per_job"),
        ("workers_per_job = 65", "workers_per_job"),
        ('workers_per_job = "2"', "workers_per_job"),
        ("workers_per_job = 2.5", "workers_per_job"),
        ("write_threads = 0", "write_threads"),
        ("write_chunk_bytes = 0", "write_chunk_bytes"),
        ("write_chunk_bytes = 5000", "write_chunk_bytes"),
        ("write_chunk_bytes = 2147483648", "write_chunk_bytes"),
        ("worker_nice = 20", "worker_nice"),
        ("worker_nice = -1", "worker_nice"),
        ("heartbeat_s = 0", "heartbeat_s"),
        ("heartbeat_s = 100", "session_timeout_s"),
        ("progress_timeout_s = inf", "progress_timeout_s"),
        ("stop_timeout_s = nan", "stop_timeout_s"),
        ("idle_exit_s = -1.0", "idle_exit_s"),
        ('shm_dir = "shm"', "shm_dir"),
        ("memory_reserve_bytes = -1", "memory_reserve_bytes"),
        ("memory_reserve_fraction = 1.0", "memory_reserve_fraction"),
        ("memory_reserve_fraction = nan", "memory_reserve_fraction"),
        ("work_attempts = 0", "work_attempts"),
        ('http = "nowhere"', "http"),
        ("http = 9437", "http"),
        ("workers = 2", "workers"),
        ('http_token_file = "token"', "http_token_file"),
        ("http_connections = 15", "http_connections"),
        ('http_hosts = "node7"', "http_hosts"),
        ("[http]\nport = 1", "http"),
    ],
)
def test_a_mistake_is_one_line_with_file_key_and_remedy(write, line, key):
    path = write(line)
    with pytest.raises(BadConfig) as caught:
        load_config()
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert key in text
    assert "correct" in text
    assert "\n" not in text


def test_an_unknown_key_is_answered_with_the_known_ones(write):
    path = write("worker_per_job = 2")
    with pytest.raises(BadConfig) as caught:
        load_config()
    assert str(caught.value).startswith(f"{path}: unknown key 'worker_per_job'; ")
    assert "workers_per_job" in str(caught.value)


@pytest.mark.parametrize("text", ["http = ", b"http = '\xff'"])
def test_what_is_no_toml_is_refused(write, text):
    path = write(text)
    with pytest.raises(BadConfig, match="not a TOML file") as caught:
        load_config()
    assert caught.value.path == str(path)


def test_a_missing_file_is_not_the_defaults(tmp_path, monkeypatch):
    monkeypatch.setenv("CKPTD_CONFIG", str(tmp_path / "gone.toml"))
    with pytest.raises(BadConfig, match=r"gone\.toml: No such file or directory; correct or unset CKPTD_CONFIG"):
        load_config()


def test_each_mode_has_a_file_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    assert default_config_path("system") == "/etc/ckptd/ckptd.toml"
    for mode in ("user", "embedded"):
        assert default_config_path(mode) == str(tmp_path / ".config/ckptd/ckptd.toml")
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")  # invalid, so ignored: XDG Base Directory Specification
    assert default_config_path("user") == str(tmp_path / ".config/ckptd/ckptd.toml")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    assert default_config_path("user") == str(tmp_path / "xdg/ckptd/ckptd.toml")
    assert default_config_path("system") == "/etc/ckptd/ckptd.toml"


def test_the_default_file_is_read_where_none_is_named(write, tmp_path, monkeypatch):
    default = tmp_path / "default.toml"
    monkeypatch.delenv("CKPTD_CONFIG", raising=False)
    assert load_config(str(default)) == Config()
    default.write_text("write_threads = 3")
    assert load_config(str(default)).write_threads == 3
    write("write_threads = 5")
    assert load_config(str(default)).write_threads == 5


def test_a_default_file_that_cannot_be_read_is_not_the_defaults(tmp_path, monkeypatch):
    monkeypatch.delenv("CKPTD_CONFIG", raising=False)
    with pytest.raises(BadConfig, match="Is a directory; correct or remove it"):
        load_config(str(tmp_path))
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    with pytest.raises(BadConfig, match="dangling: No such file or directory; correct or remove it"):
        load_config(str(tmp_path / "dangling"))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("127.0.0.1:9437", ("127.0.0.1", 9437)),
        ("localhost:0", ("localhost", 0)),
        ("[::1]:65535", ("::1", 65535)),
    ],
)
def test_an_address_is_split(text, parts):
    assert parse_address(text) == parts


@pytest.mark.parametrize(
    "text",
    ["", ":1", "host", "host:", "::1:80", "[::1]", "[]:1", "h:65536", "h:-1", "h:1\n", "a/b:1", "u@h:1"],
)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(BadConfig, match="not HOST:PORT"):
        parse_address(text)


def test_bad_config_crosses_processes():
    error = BadConfig("/etc/ckptd.toml", "unknown key 'x'")
    assert BY_CODE["bad_config"] is BadConfig
    assert str(from_report(error.report())) == "/etc/ckptd.toml: unknown key 'x'"
