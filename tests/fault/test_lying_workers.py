"""A worker runs under its user's uid and may say anything: its task fails, and the next worker does the next one."""

import asyncio
import struct
import sys

import pytest

from ckptd.daemon.job.jobfiles import JobFiles
from ckptd.daemon.workers import supervisor
from ckptd.daemon.workers.supervisor import WorkerPool, WorkerSettings
from ckptd.protocol import messages
from ckptd.protocol.errors import WorkerDied
from ckptd.protocol.messages import DiscardDone, DiscardTask, Heartbeat

# Takes a task from its socket, says what it is told to, and leaves, or waits for its end.
WORKER = """
import socket, sys
line = socket.socket(fileno=int(sys.argv[1]))
line.recv(1 << 16)
line.sendall(bytes.fromhex(sys.argv[2]))
sys.argv[3] == "leaves" or line.recv(1 << 16)
"""


def framed(body):
    return struct.pack("<I", len(body)) + body


LIES = {
    "a frame of 4 GB": (b"\xff" * 4, "stays"),
    "a frame that ends early": (framed(b"x" * 100)[:50], "leaves"),
    "nonsense": (framed(b"\xff\xfe\x00"), "stays"),
    "a pickle": (framed(b"cos\nsystem\n(S'true'\ntR."), "stays"),
    "a message of another conversation": (framed(messages.encode(Heartbeat())), "stays"),
    "nothing": (b"", "leaves"),
}
TRUTH = (framed(messages.encode(DiscardDone())), "stays")


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_costs_one_task(monkeypatch, tmp_path, lie):
    sayings, restarts = [LIES[lie], TRUTH], []

    def command(descriptor, settings):
        said, then = sayings.pop(0)
        return [sys.executable, "-S", "-c", WORKER, str(descriptor), said.hex(), then]

    async def run():
        settings = WorkerSettings(count=1, nice=0, attempts=1, silence_s=10.0, identity=None)
        files = JobFiles(str(tmp_path), None, on_made=lambda: None)
        lock = files.lock_out_older_workers
        pool = WorkerPool(settings, lock=lock, on_restart=lambda: restarts.append(lie))
        pool.start()
        try:
            async with asyncio.timeout(20):
                with pytest.raises(WorkerDied):
                    await pool.run(DiscardTask("/a"))
                assert await pool.run(DiscardTask("/a")) == DiscardDone()
        finally:
            await pool.close()
            files.remove()

    monkeypatch.setattr(supervisor, "_command", command)
    asyncio.run(run())
    assert restarts == [lie]
