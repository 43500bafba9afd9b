"""The message socket answers its own probe, and says so when it does not."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import asynccontextmanager

import pytest
import zmq
import zmq.asyncio
from support.waiting import PATIENCE_S

from ckptd.daemon.session.router import Router
from ckptd.protocol.errors import WrongToken


class Strangers:
    """A handler that knows nobody and remembers whom it turned away."""

    def __init__(self):
        self.rejected = []

    def session(self, token):
        return None

    def on_message(self, session, message):
        raise AssertionError("nobody has a session")

    def reject(self, error):
        self.rejected.append(error)


@pytest.fixture
def endpoint(tmp_path):
    return f"ipc://{tmp_path}/messages.sock"


@asynccontextmanager
async def routing(endpoint):
    handler = Strangers()
    router = Router(endpoint, handler)
    task = asyncio.create_task(router.run())
    try:
        yield router, handler, task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        router.close()


def test_a_probe_goes_the_way_of_a_clients_message(endpoint):
    async def run():
        async with routing(endpoint) as (router, handler, _):
            answers = [await router.answers(timeout_s=PATIENCE_S) for _ in range(3)]
            return answers, handler.rejected

    assert asyncio.run(run()) == ([True] * 3, [])


def test_a_router_that_takes_no_messages_does_not_answer(endpoint):
    async def run():
        async with routing(endpoint) as (router, _, task):
            assert await router.answers(timeout_s=PATIENCE_S)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            silent = [await router.answers(timeout_s=0.01) for _ in range(5)]
            again = asyncio.create_task(router.run())
            recovered = await router.answers(timeout_s=PATIENCE_S)
            again.cancel()
            await asyncio.gather(again, return_exceptions=True)
            return silent, recovered

    assert asyncio.run(run()) == ([False] * 5, True)


def test_nobody_else_can_answer_for_it(endpoint):
    async def run():
        async with routing(endpoint) as (router, handler, _):
            await router.answers(timeout_s=PATIENCE_S)
            with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as stranger:
                stranger.setsockopt(zmq.LINGER, 0)
                stranger.connect(endpoint)
                await stranger.send_multipart([secrets.token_bytes(32), b""])
                async with asyncio.timeout(PATIENCE_S):
                    await stranger.recv_multipart()
            return handler.rejected

    assert [type(error) for error in asyncio.run(run())] == [WrongToken]
