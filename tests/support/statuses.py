"""Statuses as a daemon tells them, made by hand: of many ranks, and of a day worth looking at."""

from __future__ import annotations

PHASES = ("plan", "stage", "queue", "write", "fsync", "commit")


def a_save(sequence, *, name=None, state="committed", phases=(), now=1_000_000.0, ago_s=0.0, **more):
    """Return one generation; ``phases``: seconds of each, one behind the other."""
    spans, begin = [], 0.0
    for phase, seconds in zip(PHASES, phases, strict=False):
        spans.append({"phase": phase, "begin_s": begin, "seconds": seconds})
        begin += seconds
    ended = state in {"committed", "failed"}
    total = 52_000_000_000
    return {
        "sequence": sequence,
        "save_id": f"job-1-{sequence}-abcd",
        "checkpoint_id": f"/mnt/checkpoints/{name or f'step-{sequence}00'}",
        "state": state,
        "bytes_done": total if ended else 0,
        "bytes_total": total,
        "started_unix_s": now - ago_s,
        "seconds": begin,
        "ranks_sealed": 0,
        "ranks_written": 0,
        "world_size": 1,
        "incarnation": 1,
        "phases": spans,
        "bytes_per_s": None,
        "slowest_rank": None,
        "waiting_for": None,
        "error": None,
        "error_code": None,
        **more,
    }


def a_job(name, ranks, generations, *, slots=("free", "free"), **more):
    """Return a job whose ranks have the same slots."""
    sessions = [
        {
            "rank": rank,
            "pid": 40_000 + rank,
            "slots": [{"state": state, "sequence": 0 if state == "free" else 9} for state in slots],
            "slot_bytes": 6_500_000_000,
            "silent_s": 0.4,
        }
        for rank in range(ranks)
    ]
    return {
        "job": name,
        "incarnation": 1,
        "uid": 1000,
        "world_size": ranks,
        "workers": [7, 8],
        "interval_s": 600.0,
        "sessions": sessions,
        "generations": generations,
        **more,
    }


def a_status(*jobs, now=1_000_000.0, last_commit_s=None, **more):
    """Return a whole status."""
    return {
        "pid": 1234,
        "version": "0",
        "http": "127.0.0.1:9437",
        "mode": "user",
        "runtime_dir": "/run/user/1000/ckptd",
        "started_unix_s": now - 90_000,
        "uptime_s": 90_000.0,
        "now_unix_s": now,
        "last_commit_unix_s": last_commit_s,
        "volumes": {"checkpoints": {"size_bytes": 8_000_000_000_000, "free_bytes": 5_100_000_000_000, "age_s": 1.0}},
        "workers": [7, 8],
        "jobs": list(jobs),
        **more,
    }


def a_good_day():
    """Return a status with one save under way, some behind it, and one that failed."""
    now = 1_000_000.0
    saves = [
        a_save(
            number,
            ago_s=600.0 * (8 - number),
            now=now,
            phases=(0.2, 2.1 + number % 3 / 4, 0.1, 13.0 + number % 4, 0.6, 0.4),
        )
        for number in range(1, 8)
    ]
    saves[4] |= {
        "state": "failed",
        "phases": saves[4]["phases"][:3],
        "seconds": 6.5,
        "error": "rank 2: write /mnt/checkpoints/.step-500.ckptd-ab12/__2_0.distcp: No space left on device (errno 28)",
    }
    current = a_save(
        8,
        now=now,
        ago_s=11.4,
        state="staged",
        phases=(0.2, 2.4, 0.1),
        bytes_done=32_300_000_000,
        bytes_per_s=3_700_000_000.0,
        seconds=11.4,
        slowest_rank={"rank": 5, "lag_s": 0.42},
        ranks_sealed=8,
        world_size=8,
    )
    llama = a_job("llama-70b", 8, [*saves, current], slots=("free", "persisting"))
    return a_status(llama, now=now, last_commit_s=now - 588.0)
