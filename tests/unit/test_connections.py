import asyncio
import errno
import resource
import socket
import subprocess
import sys

import pytest
from support.endpoints import refused, serving, states, until

from ckptd.daemon.http import events
from ckptd.daemon.http.server import Limits


class View:
    """A service with nothing to tell."""

    def status(self):
        return {"jobs": []}

    def ready(self):
        return None


def connect(server):
    host, port = server.address.split(":")
    return socket.create_connection((host, int(port)), timeout=5)


def is_cut(connection):
    """Say whether the other end has closed; never waits."""
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


async def healthy(client):
    async with client.get("/healthz", headers={"Connection": "close"}) as answer:
        return answer.status == 200


def test_idle_connections_make_room_the_longest_idle_first():
    async def run():
        async with serving(View(), limits=Limits(connections=16)) as (server, client, metrics):
            crowd = []
            for number in range(48):
                crowd.append(connect(server))
                await until(lambda n=number: refused(metrics, "crowd") + server.connections == n + 1)
            assert [is_cut(connection) for connection in crowd] == [True] * 32 + [False] * 16
            assert refused(metrics, "crowd") == 32
            assert await healthy(client)
            assert server.connections <= 16
            for connection in crowd:
                connection.close()

    asyncio.run(run())


def test_who_is_being_answered_is_spared_and_a_full_house_takes_nobody(monkeypatch):
    async def run():
        async with serving(View(), limits=Limits(connections=16)) as (server, client, metrics):
            monkeypatch.setattr(events, "_QUIET_S", 0.002)
            answers = [await client.get("/events") for _ in range(16)]
            late = connect(server)
            await until(lambda: is_cut(late))
            assert refused(metrics, "crowd") == 1
            await asyncio.gather(*(states(answer, 1) for answer in answers))
            answers.pop().close()
            await until(lambda: server.streams == 15)
            assert await healthy(client)
            late.close()
            for answer in answers:
                answer.close()

    asyncio.run(run())


@pytest.mark.parametrize("sent", [b"", b"GET /status HT", b"GET /status HTTP/1.1\r\nHost: 127"])
def test_who_keeps_still_is_cut_after_a_while(sent):
    async def run():
        async with serving(View(), limits=Limits(idle_s=0.05)) as (server, _, metrics):
            with connect(server) as connection:
                connection.sendall(sent)
                await until(lambda: is_cut(connection))
            await until(lambda: refused(metrics, "crowd") == 1)
            await until(lambda: server.connections == 0)

    asyncio.run(run())


def test_a_stream_is_no_idle_connection(monkeypatch):
    monkeypatch.setattr(events, "_QUIET_S", 0.002)

    async def run():
        async with serving(View(), limits=Limits(idle_s=0.02)) as (server, client, _), client.get("/events") as answer:
            await states(answer, 40)
            assert server.connections == 1

    asyncio.run(run())


def test_those_that_left_are_not_counted():
    async def run():
        async with serving(View()) as (server, _, _):
            connection = connect(server)
            await until(lambda: server.connections == 1)
            connection.close()
            await until(lambda: server.connections == 0)

    asyncio.run(run())


def test_without_descriptors_an_idle_connection_goes_and_serving_goes_on(monkeypatch):
    async def run():
        async with serving(View()) as (server, client, metrics):
            idle = connect(server)
            await until(lambda: server.connections == 1)
            loop, accept = asyncio.get_running_loop(), asyncio.get_running_loop().sock_accept
            failures = [OSError(errno.EMFILE, "Too many open files")]

            async def failing(listener):
                connection = await accept(listener)
                if failures:
                    connection[0].close()
                    raise failures.pop()
                return connection

            monkeypatch.setattr(loop, "sock_accept", failing)
            assert await healthy(client)  # by the accept that was under way
            with connect(server):
                await until(lambda: is_cut(idle))
            assert await healthy(client)
            assert refused(metrics, "crowd") == 1
            idle.close()

    asyncio.run(run())


def test_the_daemon_takes_all_the_descriptors_it_may_have():
    code = "from ckptd.daemon.http.connections import raise_descriptor_limit as r; import resource; r(); "
    code += "print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lower = ["sh", "-c", f'ulimit -S -n 64; exec "{sys.executable}" -c "{code}"']
    ran = subprocess.run(lower, capture_output=True, text=True, check=True, timeout=30)
    assert ran.stdout.split() == [str(hard), str(hard)]
