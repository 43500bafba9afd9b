"""One of each message, by the function that reads it."""

from __future__ import annotations

from ckptd.protocol import messages as m
from ckptd.protocol import retained
from ckptd.protocol import retention_messages as r
from ckptd.protocol import wave_messages as w
from ckptd.protocol.errors import DiskFull

KEEP = r.Keep(3, 100, 2, "loss", "max")
ERROR = DiskFull("/runs", 10, 3).report()

SAMPLES = {
    m.decode_attach_request: [
        m.Attach(2, "job", 0, 2, "launch", 2.5),
        m.Resume(2, b"token", "job", 3),
        m.OpenArena(2, 8192),
        m.OpenCache(7),
        retained.OpenRetained(2, "/runs/7", "save"),
        retained.RetainedClosed(2, "served", 8192),
        m.Drain(2, 2.5),
    ],
    m.decode_attach_reply: [
        m.Attached(b"token", "ipc:///x", 3, 1.0, 5.0, 4711, "0.1.0", "name"),
        m.ArenaOpened(1, 2, 8192),
        m.CacheOpened(64, 4 << 20),
        retained.RetainedOpened([retained.RetainedImage("__0_0.distcp", 1, 7, 8192, 4096)]),
        m.Drained(2, 4711),
        m.Refused(ERROR),
    ],
    m.decode_client_message: [
        m.Heartbeat(),
        m.Propose(1, "/runs/7", "digest", b"plan", True),
        m.Sealed(1, "/runs/7", "digest", 1, 0, 8192, 4096, b"\0" * 8, 0.1, 0.2, 0.3, False),
        m.Sealed(1, "x", "handed over", 1, 0, 12288, 8192, b"\0" * 8, 0.1, 0.2, 0.3, True, 7, 4096),
        m.Sealed(
            *(1, "/runs/7", "digest", 1, 0, 8192, 12288, b"", 0.1, 0.2, 0.3),
            **{"wave_bytes": 4096, "wave_begin": 8192, "hashes": b"h" * 8, "frame_hash": 2**64 - 1},
        ),
        w.WaveSealed(1, "/runs/7", "digest", 1, 0, 8192, 12288, 4096, 4096),
        m.Sealed(1, "/runs/7", "digest", 1, 0, 8192, 4096, b"", 0.1, 0.2, 0.3, user="{}", keep=KEEP),
        r.Retain("/runs", KEEP),
        m.GaveUp(1, "/runs/7", ERROR),
        m.CacheWants("file", b"\0" * 16),
        m.CacheBegun(),
        m.CacheSkipped("file", 0, 5),
        m.CacheClaim(1, "file", 0, 5),
        m.CacheDone(1, False),
        m.CacheLeft(),
        m.Detach(),
    ],
    m.decode_daemon_message: [
        m.Echo(),
        m.Assigned(1, "digest", b"\0" * 8, 4096),
        m.Progress(1, 5, 10),
        m.SlotFreed(1, 0),
        m.Committed(1, "save"),
        m.Aborted(1, ERROR, True),
        m.CacheAnswer(1, "read", 2, 0, 5),
        m.Fenced(ERROR),
    ],
    m.decode_task: [
        m.PlanTask("/plan", [b"a", b"b"], [None, b"\0" * 8], ["one", "two"]),
        m.WriteTask("/plan", 1, "/arena", 4096, 8192, b"", "/dir", "__1_0.distcp", 4, 1 << 20),
        w.WriteWaveTask("/arena", 4096, 8192, "/dir", "__1_0.distcp", 8192, 12288, True, 4, 1 << 20),
        w.FinishWavesTask("/plan", 1, b"", "/dir", "__1_0.distcp", 12288, b"h" * 8, 2**64 - 1, 0.5, True),
        m.CommitTask("/plan", "/dir", "/runs/7", "save", [b"h"], [7], [b"o"], True, {"job": "job"}),
        m.DiscardTask("/dir"),
        r.RetainTask("/runs", KEEP, ["step-7"]),
        m.HandOverTask([m.StagedHandOver("/arena", 4096, 8192, 4096, 7)]),
    ],
    m.decode_task_reply: [
        m.PlanDone([b"\0" * 8], [4096]),
        m.WriteProgress(5),
        w.WaveWritten(0.5, False),
        m.WriteDone(4096, b"\0" * 8, 2**64 - 1, 0.5, 0.25, True),
        m.CommitDone(4096),
        m.DiscardDone(),
        r.RetainDone(["step-1"], ["step-2"], ["unlink: no"]),
        m.HandOverDone(b"metadata"),
        m.TaskFailed(ERROR),
    ],
}
DECODERS = list(SAMPLES)
