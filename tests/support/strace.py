"""System calls of another process, seen and made to fail with strace."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path

from support.mounts import unavailable
from support.waiting import PATIENCE_S, wait_readable

# What makes, fills, names, syncs and removes files.
FILE_CALLS = (
    "open,openat,creat,write,pwrite64,ftruncate,fallocate,fsync,fdatasync,sync_file_range,rename,renameat,renameat2,"
    "mkdir,mkdirat,link,linkat,symlink,symlinkat,unlink,unlinkat,rmdir,copy_file_range,sendfile"
)


@contextmanager
def traced(pids, log, *, calls=FILE_CALLS, inject=()):
    """Trace processes, with all threads and processes that they start meanwhile; they run on when the block ends.

    Args:
        pids: The process, or several.
        log: File for the calls, one per line.
        calls: Names of the calls that are told.
        inject: What fails, as ``strace -e inject=`` takes it; a count (``when=``) is of each thread's calls.
    """
    if shutil.which("strace") is None:
        unavailable("strace is not installed (make system-packages)")
    options = [f"--inject={fault}" for fault in inject]
    pids = [pids] if isinstance(pids, int) else pids
    attached = [part for pid in pids for part in ("-p", str(pid))]
    command = ["strace", "-f", "-y", "-s", "0", "-o", str(log), f"--trace={calls}", *options, *attached]
    tracer = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        _wait_attached(tracer, pids)
        yield
    finally:
        tracer.send_signal(signal.SIGTERM)
        tracer.wait(PATIENCE_S)
        tracer.stderr.close()


def _wait_attached(tracer, pids):
    said = b""
    while not all(f"Process {pid} attached".encode() in said for pid in pids):
        wait_readable(tracer.stderr, "strace to attach")
        part = os.read(tracer.stderr.fileno(), 1 << 16)
        said += part
        if not part or b"attach:" in said:
            unavailable(f"strace cannot attach: {said.decode(errors='replace').strip()}")


def lines(log):
    """Return thread and text of each call in a log, in the order of their ends; calls cut in two are put together."""
    found, begun = [], {}
    for line in Path(log).read_text(errors="replace").splitlines():
        thread, _, text = line.partition(" ")
        text = text.strip()
        if text.endswith("<unfinished ...>"):
            begun[thread] = text.removesuffix("<unfinished ...>")
            continue
        resumed = re.match(r"<\.\.\. \w+ resumed>", text)
        if resumed:
            text = begun.pop(thread) + text[resumed.end() :]
        if not text.startswith(("+++", "---")):
            found.append((int(thread), text))
    return found
