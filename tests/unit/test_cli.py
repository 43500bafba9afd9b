import json
import os
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType

import pytest

from ckptd import __version__
from ckptd.daemon import cli
from ckptd.daemon.cli import status as status_command
from ckptd.protocol.errors import CkptdError, UnknownCheckpoint, WrongBits

GENERATION = {
    **{"sequence": 3, "checkpoint_id": "/c/[bold]step-3", "state": "committing", "ranks_sealed": 1},
    **{"bytes_done": 5, "bytes_total": 10, "started_unix_s": 1.0, "seconds": 2.5, "error": None},
}
SESSION = {"rank": 0, "pid": 42, "slot_bytes": 4096, "silent_s": 0.5}
JOB = {
    **{"job": "gpt", "incarnation": 1, "uid": 7, "world_size": 2, "generations": [GENERATION]},
    "sessions": [{**SESSION, "slots": [{"state": "persisting", "sequence": 3}, {"state": "free", "sequence": None}]}],
}
STATUS = {
    **{"pid": 11, "version": "9.9", "http": "127.0.0.1:1", "mode": "user", "runtime_dir": "/r"},
    **{"started_unix_s": 1.0, "uptime_s": 60.0, "workers": [12, 13], "jobs": [JOB], "of_the_future": True},
}


@dataclass
class Report:
    items: int = 2
    bytes: int = 4096
    hashes_checked: int = 2
    faults: list[CkptdError] = field(default_factory=list)
    crcs_checked: int = 0


@pytest.fixture
def run(monkeypatch, capsys):
    """Run ``ckptd`` with arguments; return its exit status, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["ckptd", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return caught.value.code or 0, out, err

    return run


@pytest.fixture
def runtime(tmp_path, monkeypatch):
    directory = tmp_path / "run"
    directory.mkdir()
    monkeypatch.setenv("CKPTD_RUNTIME_DIR", str(directory))
    monkeypatch.setenv("COLUMNS", "200")
    return directory


@pytest.fixture
def verifier(monkeypatch):
    """Put a module in the place of ckptd.checkpoint.verify that answers what it is told."""
    calls = []

    def install(outcome):
        def verify_checkpoint(path, *, threads, progress=None):
            calls.append((path, threads, progress))
            if isinstance(outcome, CkptdError):
                raise outcome
            return outcome

        module = ModuleType("ckptd.checkpoint.verify")
        module.verify_checkpoint = verify_checkpoint
        monkeypatch.setitem(sys.modules, "ckptd.checkpoint.verify", module)
        return calls

    return install


@contextmanager
def daemon(runtime, body, *, status=200):
    """Answer each GET with ``body`` on the address that the runtime directory names."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["Host"]))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        address = f"127.0.0.1:{server.server_address[1]}"
        (runtime / "http").write_text(address + "\n")
        try:
            yield address, asked
        finally:
            server.shutdown()
            thread.join()


def test_version(run):
    assert run("--version") == (0, f"ckptd {__version__}\n", "")


def test_status_as_json_is_the_daemons_answer(run, runtime, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # must not be asked
    body = json.dumps(STATUS).encode()
    with daemon(runtime, body) as (address, asked):
        code, out, err = run("status", "--json")
    assert (code, json.loads(out), err) == (0, STATUS, "")
    assert asked == [("/status", address)]


def test_status_shows_jobs_ranks_and_generations(run, runtime):
    with daemon(runtime, json.dumps(STATUS).encode()):
        code, out, err = run("status")
    assert (code, err) == (0, "")
    assert "ckptd 9.9, pid 11, user, http://127.0.0.1:1, up 60 s, 2 workers" in out
    assert "job gpt, incarnation 1, uid 7, 2 ranks" in out
    assert "persisting #3, free" in out
    assert "/c/[bold]step-3" in out
    assert "50 % of 10 bytes" in out


def test_status_of_an_idle_daemon(run, runtime):
    with daemon(runtime, json.dumps({**STATUS, "jobs": []}).encode()):
        code, out, _ = run("status")
    assert (code, out.splitlines()[1]) == (0, "no jobs")


def test_names_of_others_cannot_steer_the_terminal(run, runtime):
    generation = {
        **GENERATION,
        "checkpoint_id": "/c/\x1b[2J",
        "error": "a\nb",
        "bytes_total": 0,
        "seconds": None,
    }
    status = {**STATUS, "jobs": [{**JOB, "job": "\x1b]0;", "generations": [generation]}]}
    with daemon(runtime, json.dumps(status).encode()):
        code, out, _ = run("status")
    assert code == 0
    assert "\x1b" not in out
    assert "/c/?[2J" in out
    assert "a?b" in out


@pytest.mark.parametrize("body", [b"not json", b'{"pid": "one"}'])
def test_an_answer_that_cannot_be_read_is_one_line(run, runtime, body):
    with daemon(runtime, body):
        code, out, err = run("status")
    assert (code, out) == (1, "")
    assert err.startswith("ckptd: not a ckptd message: status: ")
    assert err.count("\n") == 1


def test_without_a_daemon_status_says_how_to_start_one(run, runtime):
    code, out, err = run("status")
    assert (code, out) == (1, "")
    assert err == (
        f"ckptd: no ckptd daemon at {runtime}: {runtime}/http: No such file or directory; "
        "start one with `ckptd serve`\n"
    )


def test_a_daemon_that_died_left_only_its_address(run, runtime):
    with daemon(runtime, b""):
        pass
    code, _, err = run("status", "--json")
    assert code == 1
    assert err.startswith(f"ckptd: no ckptd daemon at {runtime}: 127.0.0.1:")
    assert err.endswith("Connection refused; start one with `ckptd serve`\n")


def test_something_else_on_the_port_is_not_a_daemon(run, runtime):
    with daemon(runtime, b"no", status=421):
        code, _, err = run("status")
    assert code == 1
    assert "answered 421" in err


def test_a_spoilt_address_file_is_one_line(run, runtime):
    (runtime / "http").write_text("http://evil\n")
    code, _, err = run("status")
    assert (code, err.count("\n")) == (1, 1)
    assert "not HOST:PORT" in err


def test_a_user_without_a_daemon_of_his_own_sees_the_systems(run, tmp_path, monkeypatch):
    monkeypatch.delenv("CKPTD_RUNTIME_DIR", raising=False)
    own, systems = tmp_path / "own", tmp_path / "systems"
    own.mkdir()
    systems.mkdir()
    monkeypatch.setattr(status_command, "runtime_dir", lambda: str(own))
    monkeypatch.setattr(status_command, "_SYSTEM_RUNTIME", str(systems))
    assert f"no ckptd daemon at {own}" in run("status")[2]
    with daemon(systems, json.dumps(STATUS).encode()):
        assert run("status", "--json")[0] == 0
        (own / "http").write_text("127.0.0.1:9\n")
        assert f"no ckptd daemon at {own}" in run("status")[2], "one's own comes first"
        monkeypatch.setenv("CKPTD_RUNTIME_DIR", str(tmp_path / "named"))
        monkeypatch.setattr(status_command, "runtime_dir", lambda: str(tmp_path / "named"))
        assert f"no ckptd daemon at {tmp_path}/named" in run("status")[2], "one that was named is the only one"


def test_serve_becomes_the_daemon(run, monkeypatch):
    class Replaced(SystemExit):
        pass

    started = []

    def execv(path, arguments):
        started.append((path, arguments))
        raise Replaced(0)

    monkeypatch.setattr(os, "execv", execv)
    base = [sys.executable, "-P", "-m", "ckptd.daemon"]
    run("serve")
    run("serve", "--http", "[::1]:0", "--mode", "embedded")
    run("serve", "--mode", "auto")
    assert [path for path, _ in started] == [sys.executable] * 3
    assert [arguments for _, arguments in started] == [
        base,
        [*base, "--http", "[::1]:0", "--mode", "embedded"],
        base,
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ("serve", "--http", "nope"),
        ("serve", "--mode", "fast"),
        ("verify",),
        ("verify", "/c", "--threads", "0"),
        ("status", "extra"),
        ("fly",),
    ],
)
def test_wrong_usage_is_2(run, verifier, arguments):
    verifier(Report())
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert "Traceback" not in err


def test_a_good_checkpoint_is_0(run, verifier):
    calls = verifier(Report())
    assert run("verify", "/c", "--threads", "3") == (
        0,
        "/c: good, 2 items, 4096 bytes, 2 hashes checked\n",
        "",
    )
    assert calls == [("/c", 3, None)]  # nobody looks: stderr is no terminal


def test_each_fault_is_a_line_and_1(run, verifier):
    verifier(Report(faults=[WrongBits("/c/a", "w", 0), WrongBits("/c/b", "x\n", 64)]))
    code, out, err = run("verify", "/c")
    assert (code, out) == (1, "")
    first, second = err.splitlines()
    assert first.startswith("ckptd: /c/a: item 'w' at offset 0")
    assert second.startswith("ckptd: /c/b: item 'x")


def test_faults_as_json_carry_their_facts(run, verifier):
    fault = WrongBits("/c/a", "w", 64)
    verifier(Report(faults=[fault]))
    code, out, err = run("verify", "/c", "--json")
    assert (code, err) == (1, "")
    assert json.loads(out) == {
        **{"good": False, "path": "/c", "items": 2, "bytes": 4096, "hashes_checked": 2},
        "crcs_checked": 0,
        "faults": [
            {"code": "wrong_bits", "message": str(fault), "path": "/c/a", "item": "w", "offset": 64},
        ],
    }


def test_a_good_checkpoint_as_json(run, verifier):
    verifier(Report())
    code, out, _ = run("verify", "/c", "--json")
    assert code == 0
    assert json.loads(out)["good"] is True
    assert json.loads(out)["faults"] == []


@pytest.mark.parametrize("option", [(), ("--json",)])
def test_what_is_no_checkpoint_is_not_good(run, verifier, option):
    verifier(UnknownCheckpoint("/c"))
    code, out, err = run("verify", "/c", *option)
    assert code == 1
    if option:
        assert json.loads(out)["good"] is False
        assert [fault["code"] for fault in json.loads(out)["faults"]] == ["unknown_checkpoint"]
    else:
        assert err == f"ckptd: {UnknownCheckpoint('/c')}\n"


def test_progress_is_drawn_where_somebody_looks(run, verifier, monkeypatch):
    calls = verifier(Report())
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda _: True)
    code, out, _ = run("verify", "/c")
    assert (code, out) == (0, "/c: good, 2 items, 4096 bytes, 2 hashes checked\n")
    [(_, _, progress)] = calls
    assert progress is not None
