"""Commands that speak to a running daemon, or look at what it does, as processes of their own."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from support.clients import assert_holds
from support.mounts import need_root
from support.nursery import state
from support.processes import stopped
from support.users import NOBODY, open_interpreter
from support.waiting import PATIENCE_S, wait_readable, wait_until

from ckptd.protocol import messages
from ckptd.protocol.errors import CkptdError
from ckptd.protocol.paths import attach_socket

CKPTD = str(Path(sys.executable).with_name("ckptd"))


@pytest.fixture
def ckptd(runtime):
    """Run the command line on this test's runtime directory."""

    def run(*arguments, prefix=(), **variables):
        return subprocess.run(
            [*prefix, CKPTD, *map(str, arguments)],
            env={**os.environ, **runtime.environment, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            cwd="/",
        )

    return run


def ready(daemon):
    return daemon.get("/readyz")


class TestDrain:
    def test_a_sealed_save_is_finished_and_nothing_new_is_taken(self, daemon, client, ckptd, tmp_path):
        client.save(state(), checkpoint_id=tmp_path / "a")
        with stopped(*daemon.workers()):
            future = client.async_save(state(1, 2.0), checkpoint_id=tmp_path / "b")
            daemon.wait_for_save(tmp_path / "b", lambda save: save["state"] == "staged")
            late = ckptd("drain", "--timeout", "0.1")
            assert (late.returncode, late.stdout) == (1, "")
            assert "1 saves are unfinished" in late.stderr
            assert ready(daemon) == (503, "draining\n")
            assert not future.done()
        done = ckptd("drain", "--json")
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout) == {"drained": True, "unfinished": 0, "pid": daemon.pid}
        future.result(PATIENCE_S)
        assert_holds(tmp_path / "b", value=2.0)
        refused = client.async_save(state(1, 3.0), checkpoint_id=tmp_path / "c")
        with pytest.raises(CkptdError, match="shutting down"):
            refused.result(PATIENCE_S)
        assert not (tmp_path / "c").exists()
        assert daemon.status()["takes_saves"] is False
        assert f"daemon pid {daemon.pid} is drained" in ckptd("drain").stdout

    def test_where_no_daemon_runs_none_is_started(self, runtime, ckptd):
        with socket.socket(socket.AF_UNIX) as held:  # as a service manager holds it
            held.bind(attach_socket(runtime.path))
            held.listen()
            done = ckptd("drain")
            assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
            assert "start one with `ckptd serve`" in done.stderr
            held.setblocking(False)
            with pytest.raises(BlockingIOError):
                held.accept()

    def test_another_user_may_not(self, runtime, start_daemon, ckptd, tmp_path):
        need_root("another user")
        Path(runtime.path).chmod(0o755)
        inside = open_interpreter(tmp_path)
        daemon = start_daemon(mode="system", prefix=inside)
        as_nobody = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--"]
        done = ckptd("drain", prefix=[*inside, *as_nobody])
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert str(NOBODY) in done.stderr
        assert ready(daemon) == (200, "ready\n")

    @pytest.mark.parametrize("timeout_s", [-1.0, 1e9, float("nan")])
    def test_no_order_without_bounds_is_taken(self, daemon, runtime, timeout_s):
        frame = messages.encode(messages.Drain(messages.PROTOCOL_VERSION, timeout_s))
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(attach_socket(runtime.path))
            connection.sendall(struct.pack("<I", len(frame)) + frame)
            wait_readable(connection, "the refusal")
            reply = messages.decode_attach_reply(connection.recv(4096)[4:])
        assert reply.error.code == "bad_message"
        assert ready(daemon) == (200, "ready\n")


class TestGc:
    def test_a_save_in_flight_is_never_touched(self, mounts, start_daemon, client, ckptd, tmp_path):
        daemon = start_daemon(shm_dir=str(mounts.tmpfs(mib=64, name="shm")))  # others may keep dead daemons on theirs
        client.save(state(), checkpoint_id=tmp_path / "a")
        dead = tmp_path / ".a.ckptd-job-1-1-dead"
        dead.mkdir()
        with stopped(*daemon.workers()):
            future = client.async_save(state(1, 2.0), checkpoint_id=tmp_path / "b")
            save = daemon.wait_for_save(tmp_path / "b", lambda save: save["state"] == "staged")
            at_work = tmp_path / f".b.ckptd-{save['save_id']}"
            at_work.mkdir(exist_ok=True)
            done = ckptd("gc", tmp_path, "--yes", "--json", "--older-than", "0", "--shm-dir", daemon.runtime.shm_dir)
        facts = json.loads(done.stdout)
        assert (done.returncode, done.stderr) == (0, "")
        assert facts["removed"] == [str(dead)]
        kept = {one["path"]: one["keep"] for one in facts["left"]}
        assert kept[str(at_work)] == "a daemon is working on it"
        assert kept[str(daemon.runtime.arenas)] == "its daemon lives, or is not ours to judge"
        future.result(PATIENCE_S)
        assert_holds(tmp_path / "b", value=2.0)

    def test_arenas_of_a_killed_daemon_go_when_no_trainer_waits(self, mounts, start_daemon, trainers, ckptd, tmp_path):
        shm = mounts.tmpfs(mib=64, name="shm")
        daemon = start_daemon(shm_dir=str(shm))
        arenas = daemon.runtime.arenas
        trainer = trainers.start()
        trainer.do("dcp.save(state(), checkpoint_id=path)", path=str(tmp_path / "a"))
        daemon.kill()
        kept = ckptd("gc", "--shm-dir", shm, "--yes")
        assert (kept.returncode, kept.stderr) == (0, "")
        assert "kept: trainers live that wait for its next daemon" in kept.stdout
        assert arenas.exists()
        trainer.kill()
        done = ckptd("gc", "--shm-dir", shm, "--yes")
        assert (done.returncode, done.stderr) == (0, "")
        assert not arenas.exists()


class Terminal:
    """A command in a terminal of 100 columns."""

    def __init__(self, command, environment):
        self.pid, self._master = pty.fork()
        if self.pid == 0:
            os.execve(command[0], command, environment)
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        self.seen, self._ended = "", False

    def wait_for(self, text):
        """Read until a text was drawn."""
        deadline = time.monotonic() + PATIENCE_S
        while text not in self.seen:
            wait_readable(self._master, f"{text!r} in {self.seen!r}", timeout_s=deadline - time.monotonic())
            self.seen += os.read(self._master, 65536).decode(errors="replace")

    def press(self, keys):
        """Type."""
        os.write(self._master, keys)

    def close(self):
        """End it if it has not ended."""
        if not self._ended:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def wait(self):
        """Read the rest and return the exit status."""
        while True:
            try:
                part = os.read(self._master, 65536)
            except OSError:  # the other end is closed: Linux says EIO
                break
            if not part:
                break
            self.seen += part.decode(errors="replace")
        _, status = os.waitpid(self.pid, 0)
        os.close(self._master)
        self._ended = True
        return os.waitstatus_to_exitcode(status)


@pytest.fixture
def top(runtime):
    """Start `ckptd top` in a terminal."""
    started = []

    def start():
        environment = {**os.environ, **runtime.environment, "TERM": "xterm"}
        started.append(Terminal([CKPTD, "top", "--interval", "0.2"], environment))
        return started[-1]

    yield start
    for terminal in started:
        terminal.close()


class TestTop:
    @pytest.mark.parametrize("end", [b"q", b"\x03"])
    def test_it_follows_saves_until_it_is_told_to_end(self, daemon, client, top, tmp_path, end):
        client.save(state(), checkpoint_id=tmp_path / "first")
        terminal = top()
        terminal.wait_for("committed")
        assert f"pid {daemon.pid}" in terminal.seen
        client.save(state(1, 2.0), checkpoint_id=tmp_path / "second")
        terminal.wait_for("   2   committed")
        terminal.press(end)
        assert terminal.wait() == 0
        assert terminal.seen.rstrip().endswith("\x1b[?25h\x1b[?1049l"), "the screen is as it was before"
        assert "Traceback" not in terminal.seen

    def test_a_daemon_that_ends_does_not_end_it(self, start_daemon, top):
        daemon = start_daemon()
        terminal = top()
        terminal.wait_for(f"pid {daemon.pid}")
        daemon.stop()
        terminal.wait_for("no ckptd daemon at")
        again = start_daemon()
        terminal.wait_for(f"pid {again.pid}")
        terminal.press(b"q")
        assert terminal.wait() == 0


def test_bench_measures_the_machine_and_a_save(daemon, ckptd, tmp_path):
    done = ckptd("bench", tmp_path, "--mib", "16", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    figures = json.loads(done.stdout)
    assert figures["bytes"] == 16 << 20
    assert all(figures[name] > 0 for name in ("memcpy_s", "write_s", "stall_s", "durable_s", "load_s"))
    assert figures["stall_s"] <= figures["durable_s"]
    [save] = [save for save in daemon.generations() if save["state"] == "committed"]
    assert save["bytes_total"] >= 16 << 20
    assert list(tmp_path.iterdir()) == []
    table = ckptd("bench", tmp_path, "--mib", "1")
    assert [line.rsplit(maxsplit=2)[0] for line in table.stdout.splitlines()] == [
        *("What", "copy into shared memory", "raw write, durable", "save: trainer stalled", "save: durable"),
        "load, verified",
    ]


def test_bench_says_in_one_line_what_a_trainer_could_not_do(ckptd, tmp_path):
    done = ckptd("bench", tmp_path, "--mib", "1", CKPTD_EMBEDDED="0")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "no ckptd daemon at" in done.stderr
    assert list(tmp_path.iterdir()) == []
    done = ckptd("bench", tmp_path / "gone", "--mib", "1")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)


def test_doctor_finds_the_daemon_and_its_file(daemon, ckptd, tmp_path):
    config = Path(daemon.runtime.path, "config.toml")
    done = ckptd("doctor", tmp_path, "--json", CKPTD_CONFIG=str(config))
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["daemon"]["found"].startswith(f"pid {daemon.pid}, ")
    assert checks["daemon"]["verdict"] == checks["configuration"]["verdict"] == "ok"
    bad = tmp_path / "bad.toml"
    bad.write_text("writers = 4\n")
    done = ckptd("doctor", tmp_path, CKPTD_CONFIG=str(bad))
    assert done.returncode == 1
    assert f"{bad}: unknown key 'writers'" in done.stdout


@pytest.mark.parametrize(
    ("text", "said"),
    [("writers = 4", "unknown key 'writers'"), ("write_threads = 'a'", "write_threads: "), (None, "Is a directory")],
)
def test_a_daemon_does_not_start_with_a_configuration_that_it_cannot_use(ckptd, tmp_path, text, said):
    path = tmp_path / "ckptd.toml"
    path.mkdir() if text is None else path.write_text(text)
    done = ckptd("serve", CKPTD_CONFIG=str(path))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert said in done.stderr


def test_help_is_there_at_once_and_loads_little():
    code = "import sys; sys.argv = ['ckptd', '--help']\nfrom ckptd.daemon.cli import main\ntry: main()\n"
    code += (
        "except SystemExit: pass\nprint([name for name in ('torch', 'numpy', 'zmq', 'aiohttp') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.endswith("[]\n")
    cpu_s = []
    for _ in range(3):
        before = os.times()
        subprocess.run([CKPTD, "--help"], stdout=subprocess.DEVNULL, check=True, timeout=60)
        after = os.times()
        cpu_s.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(cpu_s) < 0.3


@pytest.mark.parametrize(
    "words", [("status",), ("status", "--json"), ("top",), ("--help",), ("gc", "--dry-run"), ("doctor", ".")]
)
def test_a_reader_that_goes_away_is_no_traceback(daemon, runtime, tmp_path, words):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as out:
        ran = subprocess.run(
            [CKPTD, *words],
            env={**os.environ, **runtime.environment},
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=60,
            cwd=tmp_path,
        )
    assert (ran.returncode, ran.stderr) == (1, "")


def test_ctrl_c_is_no_traceback(daemon, client, ckptd, runtime, tmp_path):
    client.save(state(), checkpoint_id=tmp_path / "a")
    with stopped(*daemon.workers()):
        future = client.async_save(state(1, 2.0), checkpoint_id=tmp_path / "b")
        daemon.wait_for_save(tmp_path / "b", lambda save: save["state"] == "staged")
        waiting = subprocess.Popen(
            [CKPTD, "drain"],
            env={**os.environ, **runtime.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_until(lambda: ready(daemon)[0] == 503, "the drain")
        waiting.send_signal(signal.SIGINT)
        out, err = waiting.communicate(timeout=PATIENCE_S)
    assert (waiting.returncode, out) == (130, "")
    assert "Traceback" not in err
    future.result(PATIENCE_S)
