import asyncio
import json
import re
import socket
from importlib.resources import files

import pytest
from aiohttp import ClientSession

from ckptd.daemon.gate import is_our_host
from ckptd.daemon.http import _listen, start_http
from ckptd.daemon.metrics import CONTENT_TYPE, Live, Metrics
from ckptd.protocol.errors import BadConfig, SystemCallFailed

EVIL = '<script>alert("1")</script>'


class FakeView:
    """A service with one job, ready unless told otherwise."""

    def __init__(self):
        self.reason = None
        generation = {
            **{"sequence": 3, "checkpoint_id": f"/c/{EVIL}", "state": "failed", "ranks_sealed": 1},
            **{
                "bytes_done": 5,
                "bytes_total": 10,
                "started_unix_s": 1.0,
                "seconds": 2.5,
                "error": f"E{EVIL}",
            },
        }
        job = {"job": f"J{EVIL}", "incarnation": 1, "uid": 7, "world_size": 2, "sessions": []}
        self.answer = {
            "pid": 1,
            "version": "0",
            "mode": f"M{EVIL}",
            "jobs": [{**job, "generations": [generation]}],
        }

    def status(self):
        return self.answer

    def ready(self):
        return self.reason


def exchange(*requests, view=None):
    """Start a server, send (method, path, headers) in turn, and return (status, headers, body) of each."""

    async def run():
        metrics = Metrics(lambda: Live({}, queue_depth=0, sessions=0, workers=0, arena_bytes=0))
        server = await start_http("127.0.0.1:0", view or FakeView(), metrics)
        answers = []
        try:
            async with asyncio.timeout(5), ClientSession(f"http://{server.address}") as client:
                for method, path, headers in requests:
                    async with client.request(method, path, headers=headers) as answer:
                        answers.append((answer.status, answer.headers, await answer.text()))
        finally:
            await server.close()
        return answers

    return asyncio.run(run())


def get(path, *, view=None):
    [answer] = exchange(("GET", path, None), view=view)
    return answer


def test_the_routes_answer():
    status, headers, body = get("/metrics")
    assert (status, headers["Content-Type"]) == (200, CONTENT_TYPE)
    assert "\nckptd_sessions 0.0\n" in body
    assert get("/healthz")[::2] == (200, "ok\n")
    assert get("/readyz")[::2] == (200, "ready\n")
    status, headers, body = get("/status")
    assert (status, headers["Content-Type"]) == (200, "application/json")
    assert json.loads(body) == FakeView().answer
    assert get("/nothing")[0] == 404


def test_not_ready_says_why_and_stays_healthy():
    view = FakeView()
    view.reason = "shutting down"
    assert get("/readyz", view=view)[::2] == (503, "shutting down\n")
    assert get("/healthz", view=view)[0] == 200


def test_head_is_answered_and_nothing_else_than_reading_is():
    answers = exchange(("HEAD", "/metrics", None), ("POST", "/status", None), ("DELETE", "/", None))
    assert [status for status, _, _ in answers] == [200, 405, 405]
    assert answers[0][2] == ""


@pytest.mark.parametrize(
    ("path", "content_type"),
    [("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript"), ("/icon.svg", "image/svg+xml")],
)
def test_the_pages_files_come_whole_and_under_a_strict_policy(path, content_type):
    status, headers, body = get(path)
    assert (status, headers["Content-Type"]) == (200, f"{content_type}; charset=utf-8")
    policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert body == files("ckptd.daemon").joinpath("web", path.strip("/") or "page.html").read_text()


@pytest.mark.parametrize("name", ["page.html", "page.css", "page.js", "icon.svg"])
def test_the_page_loads_nothing_from_elsewhere_and_makes_no_markup_from_text(name):
    text = files("ckptd.daemon").joinpath("web", name).read_text()
    assert not re.findall(r"(?:https?:)?//(?!www\.w3\.org/2000/svg)[\w.-]+\.\w+", text)
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|\son\w+=\"", text)
    assert "@import" not in text


@pytest.mark.parametrize("path", ["/", "/status", "/metrics", "/healthz", "/nothing"])
def test_a_foreign_host_is_refused_everywhere(path):
    status, headers, body = exchange(("GET", path, {"Host": "evil.example"}))[0]
    assert (status, body) == (421, "this is not the host you asked for\n")
    assert "Content-Security-Policy" in headers


def test_a_request_without_a_host_is_refused():
    async def run():
        metrics = Metrics(lambda: Live({}, queue_depth=0, sessions=0, workers=0, arena_bytes=0))
        server = await start_http("127.0.0.1:0", FakeView(), metrics)
        host, port = server.address.split(":")
        async with asyncio.timeout(5):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"GET /status HTTP/1.0\r\n\r\n")
            line = await reader.readline()
            writer.close()
            await writer.wait_closed()
            await server.close()
        return line

    assert b" 421 " in asyncio.run(run())


@pytest.mark.parametrize(
    ("header", "ours"),
    [
        ("127.0.0.1:9437", True),
        ("127.9.9.9:9437", True),
        ("localhost:9437", True),
        ("LOCALHOST:9437", True),
        ("[::1]:9437", True),
        ("node7:9437", True),
        ("127.0.0.1:9438", False),
        ("127.0.0.1", False),
        ("10.0.0.1:9437", False),
        ("evil.example:9437", False),
        ("localhost.evil.example:9437", False),
        ("127.0.0.1.evil.example:9437", False),
        ("localhost:9437@evil.example", False),
        ("", False),
        (":9437", False),
    ],
)
def test_only_our_own_names_are_ours(header, ours):
    assert is_our_host(header, port=9437, names={"node7", "10.0.0.7"}) is ours


def test_without_a_port_a_host_means_port_80():
    assert is_our_host("localhost", port=80, names=())
    assert is_our_host("[::1]", port=80, names=())


@pytest.mark.parametrize("bound", ["0.0.0.0", "::"])
def test_bound_to_every_address_each_ip_is_ours_but_no_foreign_name(bound):
    assert is_our_host("10.0.0.1:9437", port=9437, names={bound})
    assert is_our_host(f"{socket.gethostname()}:9437", port=9437, names={bound})
    assert not is_our_host("evil.example:9437", port=9437, names={bound})


def test_bound_to_one_address_the_nodes_name_is_not_ours():
    assert not is_our_host(f"{socket.gethostname()}:9437", port=9437, names={"127.0.0.1"})


def test_of_two_that_start_at_once_the_second_is_refused():
    with _listen("127.0.0.1:0", "127.0.0.1", 0) as first, pytest.raises(SystemCallFailed, match="in use"):
        _listen("127.0.0.1", "127.0.0.1", first.getsockname()[1])


def test_a_taken_port_is_one_line_of_ours():
    async def run(address):
        await start_http(address, FakeView(), Metrics(lambda: None))

    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(SystemCallFailed) as caught:
            asyncio.run(run(address))
    assert str(caught.value) == f"bind {address}: Address already in use (errno 98)"


@pytest.mark.parametrize("address", ["nope", "127.0.0.1:http", "::1:80"])
def test_a_malformed_address_is_one_line_of_ours(address):
    with pytest.raises(BadConfig, match="not HOST:PORT"):
        asyncio.run(start_http(address, FakeView(), Metrics(lambda: None)))


def test_an_unknown_host_is_one_line_of_ours(monkeypatch):
    def fail(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(BadConfig, match="Name or service not known; write an IP address"):
        asyncio.run(start_http("nowhere.invalid:0", FakeView(), Metrics(lambda: None)))


def test_closing_frees_the_port_even_with_an_idle_connection():
    async def run():
        metrics = Metrics(lambda: None)
        first = await start_http("127.0.0.1:0", FakeView(), metrics)
        async with asyncio.timeout(5), ClientSession() as client:
            async with client.get(f"http://{first.address}/healthz") as answer:
                assert answer.status == 200
            await first.close()
            second = await start_http(first.address, FakeView(), metrics)
            assert second.address == first.address
            await second.close()

    asyncio.run(run())


def test_ipv6_is_served_and_named_in_brackets():
    async def run():
        server = await start_http("[::1]:0", FakeView(), Metrics(lambda: None))
        try:
            url = f"http://{server.address}/healthz"
            async with asyncio.timeout(5), ClientSession() as client, client.get(url) as answer:
                return server.address, answer.status
        finally:
            await server.close()

    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    address, status = asyncio.run(run())
    assert address.startswith("[::1]:")
    assert status == 200
