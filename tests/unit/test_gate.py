import os

import pytest
from aiohttp.test_utils import make_mocked_request

from ckptd.daemon.http.gate import TOKEN_VARIABLE, Access, Gate, check_exposure, load_access, load_token
from ckptd.daemon.settings.config import Config
from ckptd.protocol.errors import BadConfig

TOKEN = "correct-horse-battery"
GATE = Gate(9437, {"127.0.0.1"}, Access(TOKEN))
OPEN = Gate(9437, {"127.0.0.1"})


def request(path="/status", **headers):
    return make_mocked_request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})


def test_without_a_token_everyone_is_admitted_and_nobody_enters():
    assert OPEN.admits(request())
    assert not OPEN.is_entered_by(request("/?token="))


@pytest.mark.parametrize("shown", [f"Bearer {TOKEN}", f"bearer  {TOKEN} "])
def test_the_token_admits(shown):
    assert GATE.admits(request(Authorization=shown))


@pytest.mark.parametrize(
    "shown",
    ["", TOKEN, f"Basic {TOKEN}", "Bearer", "Bearer ", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", "Bearer ümlaut"],
)
def test_nothing_else_does(shown):
    assert not GATE.admits(request(Authorization=shown))
    assert not GATE.admits(request())


def test_our_cookie_admits_and_does_not_hold_the_token():
    assert GATE.admits(request(Cookie=f"{GATE.cookie_name}={GATE.cookie}"))
    assert TOKEN not in GATE.cookie
    assert not GATE.admits(request(Cookie=f"{GATE.cookie_name}={TOKEN}"))
    assert not GATE.admits(request(Cookie=f"ckptd-9438={GATE.cookie}"))
    assert Gate(9437, (), Access("another-token-of-ours")).cookie != GATE.cookie


def test_the_token_in_the_query_is_for_entering_only():
    assert GATE.is_entered_by(request(f"/?token={TOKEN}"))
    assert not GATE.admits(request(f"/status?token={TOKEN}"))
    assert not GATE.is_entered_by(request("/?token=wrong"))
    assert not GATE.is_entered_by(request("/"))


@pytest.mark.parametrize(
    ("hosts", "ours"),
    [
        (["node7.cluster.example:9437"], True),
        (["NODE7.cluster.example"], True),  # behind a proxy
        (["node7.cluster.example:443"], True),
        (["127.0.0.1:9437"], True),
        (["node8.cluster.example:9437"], False),
        (["node7.cluster.example.evil:9437"], False),
        (["node7.cluster.example:x"], False),
        (["node7.cluster.example"] * 2, False),
        ([], False),
    ],
)
def test_names_that_were_configured_are_ours_with_any_port(hosts, ours):
    access = load_access(Config(http_hosts=("Node7.cluster.example",)))
    assert Gate(9437, {"127.0.0.1"}, access).names_us(hosts) is ours


def test_health_is_open():
    assert GATE.admits(request("/healthz"))
    assert GATE.admits(request("/readyz"))
    assert not GATE.admits(request("/healthz/../status"))


@pytest.mark.parametrize("bound", ["127.0.0.1", "127.8.8.8", "::1"])
def test_a_loopback_address_needs_no_token(bound):
    check_exposure("host:1", bound, None)


@pytest.mark.parametrize("bound", ["0.0.0.0", "::", "10.0.0.7", "fe80::1%eth0", "2001:db8::1"])
def test_what_others_can_reach_needs_one(bound):
    check_exposure("host:1", bound, TOKEN)
    with pytest.raises(BadConfig, match="without a token; set http_token_file or CKPTD_HTTP_TOKEN, or listen on 127"):
        check_exposure("host:1", bound, None)


class TestLoading:
    """The variable, the file, and what is neither."""

    @pytest.fixture(autouse=True)
    def _unset(self, monkeypatch):
        monkeypatch.setenv(TOKEN_VARIABLE, "")

    def load(self, path=""):
        return load_token(Config(http_token_file=str(path)))

    def test_none_is_none(self):
        assert self.load() is None

    def test_the_file_is_read(self, tmp_path):
        path = tmp_path / "token"
        path.write_text(f"{TOKEN}\n")
        assert self.load(path) == TOKEN

    def test_the_variable_goes_first_and_is_not_inherited(self, monkeypatch, tmp_path):
        monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
        assert self.load(tmp_path / "missing") == TOKEN
        assert TOKEN_VARIABLE not in os.environ

    @pytest.mark.parametrize("content", [b"", b"short", b"with a blank in it", b"x" * 513, b"\xff" * 20, b"a\nb" * 9])
    def test_what_is_no_token_is_refused(self, tmp_path, content):
        path = tmp_path / "token"
        path.write_bytes(content)
        with pytest.raises(BadConfig, match="16 to 512 visible ASCII characters") as caught:
            self.load(path)
        assert caught.value.path == str(path)

    def test_a_missing_file_is_one_line_of_ours(self, tmp_path):
        with pytest.raises(BadConfig, match="No such file or directory; correct http_token_file"):
            self.load(tmp_path / "missing")
