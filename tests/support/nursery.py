"""The process from which trainers are forked: it has imported torch once, so that a trainer costs milliseconds.

Nothing is open here but the line to the tests; each trainer is a process of its own, with its own pid, threads and end.
It runs what the tests send it, one piece of Python after the other, in one namespace.
"""

from __future__ import annotations

import atexit
import gc
import os
import pickle
import signal
import socket
import struct
import sys
import threading
import time
import traceback

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import ckptd.client as dcp
from ckptd.protocol import crash_points

_LENGTH = struct.Struct("<I")


def send(connection, value):
    """Send a value."""
    data = pickle.dumps(value)
    connection.sendall(_LENGTH.pack(len(data)) + data)


def receive(connection):
    """Return the next value, or None at the end of the line."""
    head = _receive(connection, _LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    return pickle.loads(_receive(connection, _LENGTH.unpack(head)[0]))


def _receive(connection, nbytes):
    data = b""
    while len(data) < nbytes and (part := connection.recv(nbytes - len(data))):
        data += part
    return data


def outcome(future, timeout_s=30):
    """Wait for a save and return "committed", or its error as text."""
    try:
        future.result(timeout_s)
    except Exception as error:  # noqa: BLE001  # the test looks at it
        return f"{type(error).__name__}: {error}"
    return "committed"


def state(mib=1, value=1.0):
    """Return a state dict of one tensor of ``mib`` MiB, two small ones and a number."""
    tensors = {"w": torch.full((mib << 18,), value), "b": torch.arange(5)}
    return {"model": tensors, "step": int(value), "empty": torch.empty(0, 3)}


def forbid_collectives():
    """Make every collective of torch.distributed raise from now on."""

    def forbidden(*_, **__):
        raise AssertionError("a collective ran after the session was open")

    names = "all_gather all_gather_object all_reduce all_to_all barrier broadcast broadcast_object_list gather"
    names += " gather_object monitored_barrier recv reduce reduce_scatter scatter scatter_object_list send"
    names += " all_gather_into_tensor reduce_scatter_tensor isend irecv batch_isend_irecv new_group"
    for name in names.split():
        setattr(dist, name, forbidden)
        setattr(dist.distributed_c10d, name, forbidden)


def _serve(connection):
    """Run the pieces that come: ("do" or "get", source, variables)."""
    scope = {
        **{"dcp": dcp, "torch": torch, "dist": dist, "os": os, "signal": signal, "threading": threading},
        **{
            "crash_points": crash_points,
            "gc": gc,
            "time": time,
            "outcome": outcome,
            "state": state,
            "forbid_collectives": forbid_collectives,
        },
        **{"init_device_mesh": init_device_mesh, "distribute_tensor": distribute_tensor},
        **{"Shard": Shard, "Replicate": Replicate},
    }
    while (request := receive(connection)) is not None:
        kind, source, variables = request
        scope.update(variables)
        try:
            if kind == "get":
                answer = ("ok", eval(source, scope))
            else:
                answer = ("ok", exec(compile(source, "<test>", "exec"), scope))
        except BaseException as error:  # noqa: BLE001  # the test looks at it
            answer = ("error", (type(error).__name__, str(error), traceback.format_exc()))
        send(connection, answer)


def _be_a_trainer(connection, request):
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(request["environment"])
    crash_points.arm()
    for name in request["without"]:
        os.environ.pop(name, None)
    if request["uid"]:
        os.setgroups([])
        os.setgid(request["uid"])
        os.setuid(request["uid"])
    _serve(connection)


def _leave():
    """What the interpreter does at its end, without the 0.8 s in which it takes torch's modules apart."""
    threading._shutdown()
    atexit._run_exitfuncs()
    os._exit(0)


def main():
    """Fork a trainer for each request: its line comes as a descriptor, its pid goes back."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    line = socket.socket(fileno=int(sys.argv[1]))
    send(line, os.getpid())
    while True:
        _, descriptors, _, _ = socket.recv_fds(line, 1, 1)
        if not descriptors:
            return
        connection = socket.socket(fileno=descriptors[0])
        request = receive(line)
        pid = os.fork()
        if pid == 0:
            line.close()
            _be_a_trainer(connection, request)
            _leave()
        connection.close()
        send(line, pid)


if __name__ == "__main__":
    main()
