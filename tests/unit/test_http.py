import asyncio
import contextlib
import json
import re
import socket
from importlib.resources import files

import pytest
from aiohttp import ClientSession, CookieJar

from ckptd.daemon.http.gate import Access, is_our_host
from ckptd.daemon.http.server import _listen, start_http
from ckptd.daemon.monitoring.metrics import CONTENT_TYPE, Live, Metrics
from ckptd.protocol.errors import BadConfig, SystemCallFailed

TOKEN = "correct-horse-battery"
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


def exchange(*requests, view=None, token=None):
    """Start a server, send (method, path, headers) in turn, and return (status, headers, body) of each."""

    async def run():
        metrics = Metrics(lambda: Live({}, queue_depth=0, sessions=0, workers=0, arena_bytes=0))
        server = await start_http("127.0.0.1:0", view or FakeView(), metrics, access=Access(token))
        answers = []
        try:
            async with asyncio.timeout(5), ClientSession(f"http://{server.address}") as client:
                for method, path, headers in requests:
                    async with client.request(method, path, headers=headers, allow_redirects=False) as answer:
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
    wanted = files("ckptd.daemon.http").joinpath("web", path.strip("/") or "page.html").read_text()
    begin, _, end = wanted.partition(">null</script>")
    assert body.startswith(begin)
    assert body.endswith(end)


def test_the_page_comes_with_the_state_and_no_name_ends_the_data():
    _, _, body = get("/")
    data = re.search(r'<script id="first" type="application/json">(.*?)</script>', body)[1]
    assert json.loads(data) == FakeView().answer
    assert EVIL not in body
    assert body.count("<script") == 2


@pytest.mark.parametrize("name", ["page.html", "page.css", "page.js", "icon.svg"])
def test_the_page_loads_nothing_from_elsewhere_and_makes_no_markup_from_text(name):
    text = files("ckptd.daemon.http").joinpath("web", name).read_text()
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


def test_a_token_is_asked_for_everywhere_but_at_the_health_checks():
    paths = ["/", "/page.js", "/status", "/metrics", "/events", "/nothing"]
    answers = exchange(*(("GET", path, None) for path in [*paths, "/healthz", "/readyz"]), token=TOKEN)
    assert [status for status, _, _ in answers] == [401] * len(paths) + [200, 200]
    for _, headers, body in answers[: len(paths)]:
        assert headers["WWW-Authenticate"] == "Bearer"
        assert "Content-Security-Policy" in headers
        assert FakeView().answer["mode"] not in body


def test_the_token_opens_and_a_wrong_one_does_not():
    right, wrong = {"Authorization": f"Bearer {TOKEN}"}, {"Authorization": f"Bearer {TOKEN}."}
    answers = exchange(("GET", "/status", right), ("GET", "/status", wrong), ("POST", "/status", right), token=TOKEN)
    assert [status for status, _, _ in answers] == [200, 401, 405]


def test_entering_with_the_token_leaves_a_cookie_and_no_token_in_the_address():
    [(status, headers, _)] = exchange(("GET", f"/?token={TOKEN}", None), token=TOKEN)
    assert (status, headers["Location"]) == (303, "/")
    _, *attributes = headers["Set-Cookie"].split("; ")
    assert {"HttpOnly", "SameSite=Lax", "Path=/"} <= set(attributes)
    assert TOKEN not in headers["Set-Cookie"]

    async def enter():
        metrics = Metrics(lambda: Live({}, queue_depth=0, sessions=0, workers=0, arena_bytes=0))
        server = await start_http("127.0.0.1:0", FakeView(), metrics, access=Access(TOKEN))
        try:
            jar = CookieJar(unsafe=True)  # takes cookies of IP addresses, as browsers do
            async with asyncio.timeout(5), ClientSession(f"http://{server.address}", cookie_jar=jar) as client:
                async with client.get("/status", params={"token": TOKEN}) as answer:
                    assert (answer.status, str(answer.url.relative())) == (200, "/status")
                async with client.get("/metrics") as answer:
                    return answer.status
        finally:
            await server.close()

    assert asyncio.run(enter()) == 200


@pytest.mark.parametrize("path", ["//evil.example", "/nothing", "/%2F%2Fevil.example"])
def test_entering_leads_nowhere_else(path):
    head = f"GET {path}?token={TOKEN} HTTP/1.1\r\nHost: HOST\r\nConnection: close\r\n\r\n"
    answer = raw(head.encode(), token=TOKEN)
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b"Location" not in answer


def raw(*chunks, token=None):
    """Send bytes as they are and return what comes back until the end."""

    async def run():
        metrics = Metrics(lambda: Live({}, queue_depth=0, sessions=0, workers=0, arena_bytes=0))
        server = await start_http("127.0.0.1:0", FakeView(), metrics, access=Access(token))
        host, port = server.address.split(":")
        received = b""
        async with asyncio.timeout(5):
            reader, writer = await asyncio.open_connection(host, int(port))
            with contextlib.suppress(ConnectionError):
                for chunk in chunks:
                    writer.write(chunk.replace(b"HOST", server.address.encode()))
                    await writer.drain()
            with contextlib.suppress(ConnectionError):
                while data := await reader.read(1 << 16):
                    received += data
            writer.close()
            async with ClientSession(f"http://{server.address}") as client, client.get("/healthz") as answer:
                assert answer.status == 200
        await server.close()
        return received

    return asyncio.run(run())


@pytest.mark.parametrize(
    "path",
    [
        *(
            b"/../../../../etc/passwd",
            b"/..%2f..%2fetc%2fpasswd",
            b"/%2e%2e/%2e%2e/etc/passwd",
            b"/page.css/../../http.py",
        ),
        *(b"/web/page.html", b"//etc/passwd", b"/page.html", b"/.\\..\\etc\\passwd", b"/page.js%00.html", b"/\xff\xfe"),
    ],
)
def test_no_path_leads_out_of_the_pages(path):
    answer = raw(b"GET " + path + b" HTTP/1.1\r\nHost: HOST\r\nConnection: close\r\n\r\n")
    assert answer.split(b" ")[1] in {b"404", b"400"}
    assert b"root:" not in answer
    assert b"HttpServer" not in answer


@pytest.mark.parametrize(
    "head",
    [
        [b"X-Long: " + b"x" * 100_000 + b"\r\n\r\n"],
        [b"X-%d: x\r\n" % number for number in range(5000)],
        [b"x" * 65_536] * 64,
    ],
    ids=["long", "many", "endless"],
)
def test_huge_headers_are_refused(head):
    answer = raw(b"GET /status HTTP/1.1\r\nHost: HOST\r\n", *head)
    assert answer == b"" or answer.startswith((b"HTTP/1.1 400", b"HTTP/1.0 400"))
    assert b"<script>" not in answer


def test_a_huge_path_is_refused():
    assert b" 400 " in raw(b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: HOST\r\n\r\n").split(b"\r\n")[0]


@pytest.mark.parametrize("sent", [b"\x16\x03\x01\x02\x00\x01\x00", b"\x00" * 4096, b"GET\r\n\r\n", b"SSH-2.0-x\r\n"])
def test_what_is_no_http_is_answered_shortly_and_does_no_harm(sent):
    assert raw(sent + b"\r\n\r\n").startswith(b"HTTP/1.")


def test_a_body_that_nobody_asked_for_is_not_kept():
    head = b"GET /status HTTP/1.1\r\nHost: HOST\r\nContent-Length: 100000000\r\n\r\n"
    answer = raw(head, *[b"x" * 65_536] * 64)
    assert answer.startswith(b"HTTP/1.1 200 OK") or answer == b""


def test_a_token_of_any_bytes_is_just_wrong():
    head = b"GET /status HTTP/1.1\r\nHost: HOST\r\nConnection: close\r\nAuthorization: Bearer "
    assert raw(head + b"\xff\xfe\xfd\r\n\r\n", token=TOKEN).startswith(b"HTTP/1.1 40")


def test_a_scrape_that_accepts_openmetrics_gets_it():
    accept = {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"}
    odd = {"Accept": "application/openmetrics-text;version=one"}
    answers = exchange(("GET", "/metrics", accept), ("GET", "/metrics", odd), ("GET", "/metrics", {"Accept": "*/*"}))
    kinds = [headers["Content-Type"].split(";")[0] for _, headers, _ in answers]
    assert kinds == ["application/openmetrics-text", "application/openmetrics-text", "text/plain"]
    assert answers[0][2].endswith("# EOF\n")


def test_what_others_could_reach_is_not_served_without_a_token():
    async def run(token):
        server = await start_http("0.0.0.0:0", FakeView(), Metrics(lambda: None), access=Access(token))
        await server.close()

    asyncio.run(run(TOKEN))
    with pytest.raises(BadConfig, match="without a token"):
        asyncio.run(run(None))


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
