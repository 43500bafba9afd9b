import asyncio
import re
import socket
from contextlib import contextmanager

import pytest
from support.endpoints import refused, serving, states, until
from support.statuses import a_job, a_save, a_status

from ckptd.daemon.http import events
from ckptd.daemon.http.events import MOST_STREAMS
from ckptd.daemon.http.server import Limits

NUMBER = re.compile(rb'"number":(\d+),')


class View:
    """A service whose status is a number, and as long as wanted."""

    def __init__(self, padding=0):
        self.taken = 0
        self.padding = "x" * padding

    def status(self):
        self.taken += 1
        return {"number": self.taken, "padding": self.padding, "jobs": []}

    def ready(self):
        return None


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(events, "_QUIET_S", 0.002)
    monkeypatch.setattr(events, "_BUSY_S", 0.001)


def test_a_stream_begins_with_the_state_and_goes_on():
    async def run():
        view = View()
        async with serving(view) as (_, client, _), client.get("/events") as answer:
            assert answer.headers["Content-Type"] == "text/event-stream"
            assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
            return [state["number"] for state in await states(answer, 3)]

    numbers = asyncio.run(run())
    assert numbers == sorted(set(numbers))
    assert numbers[0] <= 2


def test_one_state_serves_all_streams_and_none_is_taken_when_nobody_listens():
    async def run():
        view = View()
        async with serving(view) as (server, client, _):
            answers = [await client.get("/events") for _ in range(5)]
            assert server.streams == 5
            await asyncio.gather(*(states(answer, 20) for answer in answers))
            assert view.taken < 5 * 20
            for answer in answers:
                answer.close()
            await until(lambda: server.streams == 0)
            taken = view.taken
            await asyncio.sleep(0.02)
            assert view.taken == taken

    asyncio.run(run())


def test_one_stream_too_many_is_told_to_come_back():
    async def run():
        async with serving(View()) as (server, client, metrics):
            answers = [await client.get("/events") for _ in range(MOST_STREAMS)]
            async with client.get("/events") as answer:
                assert (answer.status, answer.headers["Retry-After"]) == (503, "5")
            assert refused(metrics, "streams") == 1
            async with client.get("/healthz") as answer:
                assert answer.status == 200
            answers.pop().close()
            await until(lambda: server.streams < MOST_STREAMS)
            async with client.get("/events") as answer:
                assert answer.status == 200
            for answer in answers:
                answer.close()

    asyncio.run(run())


@contextmanager
def deaf_reader(server):
    """A client that asks for events and never reads."""
    host, port = server.address.split(":")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        connection.connect((host, int(port)))
        connection.sendall(f"GET /events HTTP/1.1\r\nHost: {server.address}\r\n\r\n".encode())
        yield connection


def test_who_does_not_read_is_cut_and_others_notice_nothing():
    async def run():
        async with serving(View(padding=400_000), limits=Limits(slow_s=0.1)) as (server, client, metrics):
            with deaf_reader(server):
                async with client.get("/events") as answer:
                    await until(lambda: server.streams == 2)
                    await states(answer, 5)
                    await until(lambda: refused(metrics, "slow") == 1)
                    await states(answer, 5)
                    assert server.streams == 1

    asyncio.run(run())


def test_a_slow_reader_gets_the_newest_state_not_a_queue_of_old_ones():
    async def run():
        view = View(padding=100_000)
        async with serving(view, limits=Limits(slow_s=30)) as (server, _, _):
            with deaf_reader(server) as connection:
                await until(lambda: view.taken > 80)
                numbers, tail, loop = [0], b"", asyncio.get_running_loop()
                connection.setblocking(False)
                while numbers[-1] <= 80:
                    tail = tail[-64:] + await loop.sock_recv(connection, 1 << 20)
                    numbers += [int(number) for number in NUMBER.findall(tail) if int(number) > numbers[-1]]
                return numbers

    numbers = asyncio.run(run())
    assert len(numbers) < 60  # the kernel's buffers hold some; we hold one


def test_closing_ends_the_streams_at_once():
    async def run():
        async with serving(View()) as (server, client, _):
            answer = await client.get("/events")
            await states(answer, 1)
            begun = asyncio.get_running_loop().time()
            await server.close()
            assert asyncio.get_running_loop().time() - begun < 0.9
            answer.close()

    asyncio.run(run())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_bug_in_the_status_ends_the_streams_and_the_next_one_begins_anew():
    async def run():
        view = View()
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # it is told of the bug
        async with serving(view) as (server, client, _):
            async with client.get("/events") as answer:
                await states(answer, 2)
                view.padding, padding = object(), view.padding  # no JSON
                await answer.read()
            await until(lambda: server.streams == 0)
            view.padding = padding
            async with client.get("/events") as answer:
                assert await states(answer, 2)

    asyncio.run(run())


def test_head_and_post_are_not_answered():
    async def run():
        async with serving(View()) as (_, client, _):
            for method in ("HEAD", "POST"):
                async with client.request(method, "/events") as answer:
                    assert answer.status == 405

    asyncio.run(run())


def test_the_pace_follows_the_saves():
    quiet = a_status(a_job("a", 1, [a_save(1)]))
    busy = a_status(a_job("a", 1, [a_save(1), a_save(2, state="staged")]))
    assert not events._is_busy(quiet)
    assert events._is_busy(busy)
