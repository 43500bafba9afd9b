"""The whole story in a minute: train, save in the background, kill the trainer, and go on as if nothing had happened.

1. A trainer (`train.py`) saves every few steps; an embedded daemon makes the checkpoints durable.
2. Right after a save was staged the trainer is killed with SIGKILL. The daemon commits that save all the same.
3. A new process resumes from it; its state is compared bit by bit with what was staged.
4. Stock torch loads the same checkpoint.

Exit status 0 if all of it came true.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

HERE = Path(__file__).parent
KILL_AFTER_STEP = 16
STEPS = 24
DEADLINE_S = 120.0
console = Console()
Event = dict[str, Any]


def trainer(directory: Path) -> subprocess.Popen[str]:
    """Start a trainer; its events come on its standard output."""
    command = [sys.executable, str(HERE / "train.py"), "--directory", str(directory), "--steps", str(STEPS)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def events(process: subprocess.Popen[str]) -> Iterator[Event]:
    """Yield a trainer's events until it ends."""
    assert process.stdout is not None
    for line in process.stdout:
        yield json.loads(line)


def ended_early(process: subprocess.Popen[str]) -> SystemExit:
    """Return how the demo ends if a trainer failed; its traceback stands above."""
    return SystemExit(f"demo: the trainer ended with status {process.wait()}; see its output above")


def generations(runtime: Path) -> list[Event]:
    """Return what the daemon tells of its saves; `ckptd status --json` shows the same."""
    address = (runtime / "http").read_text().strip()
    with urllib.request.urlopen(f"http://{address}/status", timeout=5) as answer:
        status = json.load(answer)
    return [generation for job in status["jobs"] for generation in job["generations"]]


@contextmanager
def train_bar(title: str) -> Iterator[Any]:
    """Show a bar of training steps."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("step {task.completed}/{task.total}"))
    with Progress(*columns, TextColumn("{task.fields[news]}"), console=console) as progress:
        task = progress.add_task(title, total=STEPS, news="")
        yield lambda **facts: progress.update(task, **facts)


def train_until_killed(directory: Path) -> tuple[Event, list[Event]]:
    """Train, and kill the trainer right after the save of `KILL_AFTER_STEP` was staged."""
    process = trainer(directory)
    staged: list[Event] = []
    with train_bar("training ") as show:
        for event in events(process):
            if event["event"] == "step":
                show(completed=event["step"], news=f"loss {event['loss']:.3f}")
            if event["event"] == "staged":
                staged.append(event)
                if event["step"] == KILL_AFTER_STEP:
                    process.send_signal(signal.SIGKILL)
                    break
    if process.wait() != -signal.SIGKILL:
        raise ended_early(process)
    console.print(f"SIGKILL to the trainer, right after step {KILL_AFTER_STEP} was staged")
    return staged[-1], staged


def watch_commit(runtime: Path, directory: Path) -> Event:
    """Show how the daemon finishes the dead trainer's save, and return what it tells of it."""
    target = str(directory / f"step-{KILL_AFTER_STEP:06d}")
    deadline = time.monotonic() + DEADLINE_S
    columns = (TextColumn("the daemon"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("commit", total=None)
        while time.monotonic() < deadline:
            for generation in generations(runtime):
                if generation["checkpoint_id"] == target:
                    progress.update(task, total=generation["bytes_total"], completed=generation["bytes_done"])
                    if generation["state"] in {"committed", "failed"}:
                        return generation
            time.sleep(0.01)
    raise SystemExit("the daemon did not finish the save in time")


def resume(directory: Path) -> tuple[Event, list[Event]]:
    """Start a new trainer on the same directory and let it train to the end."""
    process = trainer(directory)
    resumed: Event = {}
    staged: list[Event] = []
    with train_bar("resumed  ") as show:
        for event in events(process):
            match event["event"]:
                case "resumed":
                    resumed = event
                case "step":
                    show(completed=event["step"], news=f"loss {event['loss']:.3f}")
                case "staged":
                    staged.append(event)
    if process.wait() != 0:
        raise ended_early(process)
    return resumed, staged


def stock_digest(checkpoint: Path) -> Event:
    """Have stock torch load a checkpoint in a process that never imports ckptd's daemon or session."""
    command = [sys.executable, str(HERE / "check_with_stock.py"), str(checkpoint)]
    result: Event = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result


def table(staged: list[Event], saves: list[Event]) -> Table:
    """Return what the saves cost."""
    shown = Table(title="What the saves cost")
    for heading in ("step", "MB", "trainer stalled", "durable after", "persist rate"):
        shown.add_column(heading, justify="right")
    seconds = {Path(save["checkpoint_id"]).name: save["seconds"] for save in saves if save["state"] == "committed"}
    for event in staged:
        took_s = seconds.get(f"step-{event['step']:06d}")
        if took_s is not None:
            rate = f"{event['bytes'] / took_s / 1e9:.2f} GB/s"
            stall = f"{event['stall_s'] * 1e3:.1f} ms"
            shown.add_row(str(event["step"]), f"{event['bytes'] / 1e6:.0f}", stall, f"{took_s * 1e3:.0f} ms", rate)
    return shown


def verdict(what: str, *, holds: bool) -> bool:
    """Print one line and return whether it holds."""
    console.print(f"[{'green' if holds else 'red'}]{'yes' if holds else 'NO '}[/] {what}")
    return holds


def main() -> int:
    """Run the demo; return the exit status."""
    with tempfile.TemporaryDirectory(prefix="ckptd-demo-", dir=Path.cwd()) as place:
        directory = Path(place) / "run"
        runtime = Path(tempfile.mkdtemp(prefix="ckptd-"))
        os.environ["CKPTD_RUNTIME_DIR"] = str(runtime)
        try:
            return story(directory, runtime)
        finally:
            stop_daemon(runtime)


def story(directory: Path, runtime: Path) -> int:
    """Tell it, step by step."""
    last, staged = train_until_killed(directory)
    commit = watch_commit(runtime, directory)
    good = verdict("the daemon committed the dead trainer's save", holds=commit["state"] == "committed")
    resumed, more = resume(directory)
    same = resumed.get("digest") == last["digest"] and resumed.get("step") == KILL_AFTER_STEP
    good &= verdict("the resumed state is bit-identical to what was staged", holds=same)
    stock = stock_digest(directory / f"step-{KILL_AFTER_STEP:06d}")
    good &= verdict("stock torch loads the same bits", holds=stock == {k: last[k] for k in ("step", "digest")})
    console.print(table(staged + more, generations(runtime)))
    return 0 if good else 1


def stop_daemon(runtime: Path) -> None:
    """End the embedded daemon, which would else wait some minutes for another trainer, and remove its directory."""
    address = runtime / "http"
    if address.exists():
        with urllib.request.urlopen(f"http://{address.read_text().strip()}/status", timeout=5) as answer:
            daemon = os.pidfd_open(json.load(answer)["pid"])
        signal.pidfd_send_signal(daemon, signal.SIGTERM)
        select.select([daemon], [], [], DEADLINE_S)  # readable once the process has ended
        os.close(daemon)
    shutil.rmtree(runtime)


if __name__ == "__main__":
    sys.exit(main())
