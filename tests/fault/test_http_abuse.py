"""Whatever is done to the HTTP endpoint, a save in flight is committed and who asks properly is answered."""

import http.client
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest
from support.clients import assert_holds
from support.daemons import http_get
from support.nursery import outcome, state
from support.processes import stopped
from support.waiting import wait_readable, wait_until

CKPTD = str(Path(sys.executable).with_name("ckptd"))
TOKEN = "correct-horse-battery"
MIB = 1 << 20


def address(daemon):
    return Path(daemon.runtime.path, "http").read_text().strip()


def connect(daemon):
    host, port = address(daemon).split(":")
    return socket.create_connection((host, int(port)), timeout=20)


@contextmanager
def save_in_flight(daemon, client, path):
    """Keep a save in flight for as long as something is done to the daemon; then it must commit."""
    client.save(state(), checkpoint_id=f"{path}-before")
    with stopped(*daemon.workers()):
        future = client.async_save(state(value=3.0), checkpoint_id=path)
        daemon.wait_for_save(path, lambda save: save["state"] == "staged")
        yield
        assert not future.done()
    assert outcome(future) == "committed"
    assert_holds(path, value=3.0)


def descriptors_for(count):
    """Raise our own limit and return how many connections we may open."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return min(count, hard - 512)


def accepted(daemon):
    """Return how many connections are or were open."""
    cut = daemon.metric('ckptd_refused_http_requests_total{reason="crowd"}')
    return cut + daemon.metric("ckptd_http_connections")


@pytest.mark.parametrize(("most", "kept"), [(1024, False), (16_384, True)])
def test_10000_idle_connections(start_daemon, client, trainers, tmp_path, most, kept):
    daemon = start_daemon(http_connections=most, session_timeout_s=30.0)
    count = descriptors_for(10_000)
    with ExitStack() as crowd:
        with save_in_flight(daemon, client, tmp_path / "a"):
            for _ in range(count):
                crowd.enter_context(connect(daemon))
            wait_until(lambda: accepted(daemon) >= count, "all to be accepted, and perhaps cut again")
            assert daemon.metric("ckptd_http_connections") <= most
            assert psutil.Process(daemon.pid).num_fds() <= most + 100
            assert daemon.get("/healthz") == (200, "ok\n")
        # A trainer that comes now gets descriptors beyond 1023, which select(2) would not take.
        trainer = trainers.start()
        trainer.do("dcp.save(state(value=4.0), checkpoint_id=path)", path=str(tmp_path / "b"))
        assert_holds(tmp_path / "b", value=4.0)
        refused = daemon.metric('ckptd_refused_http_requests_total{reason="crowd"}')
        assert refused == 0 if kept else refused >= count - most
    assert daemon.get("/readyz") == (200, "ready\n")


def test_event_streams_that_nobody_reads(start_daemon, client, tmp_path):
    daemon = start_daemon()
    with ExitStack() as crowd, save_in_flight(daemon, client, tmp_path / "a"):
        for _ in range(64):
            connection = crowd.enter_context(connect(daemon))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(f"GET /events HTTP/1.1\r\nHost: {address(daemon)}\r\n\r\n".encode())
        wait_until(lambda: daemon.metric("ckptd_http_streams") == 32, "as many streams as there may be")
        wait_until(
            lambda: daemon.metric('ckptd_refused_http_requests_total{reason="streams"}') == 32, "the others' refusal"
        )
        assert psutil.Process(daemon.pid).memory_info().rss < 100 * MIB
        assert daemon.get("/healthz") == (200, "ok\n")
    wait_until(lambda: daemon.metric("ckptd_http_streams") == 0, "the end of the streams")


ODD = {
    "foreign host": (b"GET /status HTTP/1.1\r\nHost: evil.example\r\n\r\n", b" 421 "),
    "no host": (b"GET /status HTTP/1.0\r\n\r\n", b" 421 "),
    "traversal": (b"GET /../../../../etc/passwd HTTP/1.1\r\nHost: HOST\r\n\r\n", b" 404 "),
    "encoded traversal": (b"GET /..%2f..%2fetc%2fpasswd HTTP/1.1\r\nHost: HOST\r\n\r\n", b" 404 "),
    "post": (b"POST /status HTTP/1.1\r\nHost: HOST\r\nContent-Length: 2\r\n\r\n{}", b" 405 "),
    "delete": (b"DELETE / HTTP/1.1\r\nHost: HOST\r\n\r\n", b" 405 "),
    "made-up method": (b"SAVE / HTTP/1.1\r\nHost: HOST\r\n\r\n", b" 40"),
    "huge header": (b"GET / HTTP/1.1\r\nHost: HOST\r\nX: " + b"x" * 1_000_000 + b"\r\n\r\n", b" 400 "),
    "huge path": (b"GET /" + b"x" * 1_000_000 + b" HTTP/1.1\r\nHost: HOST\r\n\r\n", b" 400 "),
    "many headers": (b"GET / HTTP/1.1\r\nHost: HOST\r\n" + b"X: x\r\n" * 100_000 + b"\r\n", b" 400 "),
    "no HTTP": (b"\x16\x03\x01" + b"\x00" * 600 + b"\r\n\r\n", b" 400 "),
}


def first_line(daemon, sent):
    """Send bytes and return the first line of the answer; nothing if the connection was cut before."""
    with connect(daemon) as connection:
        try:
            connection.sendall(sent.replace(b"HOST", address(daemon).encode()))
            return connection.recv(4096).split(b"\r\n")[0]
        except ConnectionError:
            return b""


@pytest.mark.parametrize("name", ODD)
def test_odd_requests(start_daemon, client, tmp_path, name):
    sent, wanted = ODD[name]
    daemon = start_daemon()
    resident = psutil.Process(daemon.pid).memory_info().rss
    with save_in_flight(daemon, client, tmp_path / "a"):
        answers = {first_line(daemon, sent) for _ in range(30)}
        assert wanted in b"".join(answers)
        assert all(wanted in answer for answer in answers if answer)
        assert daemon.get("/healthz") == (200, "ok\n")
    assert psutil.Process(daemon.pid).memory_info().rss < resident + 40 * MIB
    assert "Traceback" not in daemon.log()


def test_a_reader_that_never_reads_its_answer(start_daemon, client, tmp_path):
    daemon = start_daemon()
    with ExitStack() as crowd, save_in_flight(daemon, client, tmp_path / "a"):
        for _ in range(200):
            connection = crowd.enter_context(connect(daemon))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(f"GET /metrics HTTP/1.1\r\nHost: {address(daemon)}\r\n\r\n".encode() * 20)
        assert daemon.get("/healthz") == (200, "ok\n")
        assert psutil.Process(daemon.pid).memory_info().rss < 200 * MIB


def test_scrapes_from_all_sides_delay_no_save(start_daemon, client, tmp_path):
    daemon = start_daemon()
    client.save(state(), checkpoint_id=tmp_path / "a")
    stop, counts = threading.Event(), []

    def scrape():
        count = 0
        while not stop.is_set():
            assert daemon.get("/metrics")[0] == 200
            count += 1
        counts.append(count)

    threads = [threading.Thread(target=scrape) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(5):
        assert outcome(client.async_save(state(value=number), checkpoint_id=tmp_path / str(number))) == "committed"
    stop.set()
    for thread in threads:
        thread.join(30)
    assert sum(counts) > 4


class TestOtherAddresses:
    """What other machines can reach needs a token."""

    def start(self, runtime, http, **environment):
        return subprocess.Popen(
            [sys.executable, "-m", "ckptd.daemon", "--mode", "user", "--http", http],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd="/",
            env={**os.environ, **runtime.environment, **environment},
        )

    @pytest.mark.parametrize("http", ["0.0.0.0:0", "[::]:0"])
    def test_without_one_the_daemon_does_not_start_and_says_why_in_one_line(self, runtime, http):
        daemon = self.start(runtime, http)
        output, errors = daemon.communicate(timeout=30)
        assert daemon.returncode == 1
        assert output == ""
        assert len(errors.splitlines()) == 1
        assert errors.startswith(f"ckptd: {http}: ")
        assert "set http_token_file or CKPTD_HTTP_TOKEN, or listen on 127.0.0.1" in errors
        assert not Path(runtime.path, "http").exists()

    def test_with_one_it_serves_and_its_own_user_is_not_asked(self, runtime, trainers, tmp_path):
        daemon = self.start(runtime, "0.0.0.0:0", CKPTD_HTTP_TOKEN=TOKEN)
        wait_readable(daemon.stdout, "the daemon's first line")
        port = daemon.stdout.readline().split("serves http://0.0.0.0:")[1].split()[0]
        at, kept = f"127.0.0.1:{port}", Path(runtime.path, "http-token")
        trainer = trainers.start()
        trainer.do("dcp.save(state(), checkpoint_id=path)", path=str(tmp_path / "a"))
        assert http_get(at, "/status")[0] == 401
        assert http_get(at, "/healthz")[0] == 200
        connection = http.client.HTTPConnection(at, timeout=20)
        connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {TOKEN}"})
        assert b'ckptd_saves_total{outcome="committed"} 1.0' in connection.getresponse().read()
        connection.close()
        assert kept.stat().st_mode & 0o777 == 0o600
        self.assert_kept_from_workers(daemon.pid)
        status = self.status(runtime)
        assert status.returncode == 0, status.stderr
        trainer.leave()
        wait_until(lambda: '"sessions":[]' in self.status(runtime).stdout, "the end of its session")
        kept.unlink()
        assert "answered 401; only its own user may read its token" in self.status(runtime).stderr
        daemon.send_signal(signal.SIGTERM)
        assert daemon.communicate(timeout=30)[1].count("Traceback") == 0
        assert daemon.returncode == 0

    def assert_kept_from_workers(self, pid):
        workers = psutil.Process(pid).children()
        assert workers
        for worker in workers:
            assert TOKEN.encode() not in Path(f"/proc/{worker.pid}/environ").read_bytes()

    def status(self, runtime):
        environment = {**os.environ, **runtime.environment}
        command = [CKPTD, "status", "--json"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)

    def test_the_token_goes_with_the_daemon(self, start_daemon, runtime, tmp_path):
        (tmp_path / "token").write_text(TOKEN)
        daemon = start_daemon(http_token_file=str(tmp_path / "token"))
        assert Path(runtime.path, "http-token").read_text().strip() == TOKEN
        daemon.stop()
        assert not Path(runtime.path, "http-token").exists()


def test_a_stopped_daemon_does_not_wait_for_those_who_watch(start_daemon):
    daemon = start_daemon()
    with connect(daemon) as watcher, connect(daemon):
        watcher.sendall(f"GET /events HTTP/1.1\r\nHost: {address(daemon)}\r\n\r\n".encode())
        assert select.select([watcher], [], [], 20)[0]
        begun = time.monotonic()
        daemon.stop()
        assert time.monotonic() - begun < 10
