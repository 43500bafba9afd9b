"""Whatever goes wrong in a command is one line on stderr and an exit status; completion and help."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ckptd.daemon import cli
from ckptd.daemon.cli import app as commands
from ckptd.protocol.errors import BadConfig

CKPTD = str(Path(sys.executable).with_name("ckptd"))
COMMANDS = {
    *("serve", "status", "top", "drain", "gc", "doctor", "bench", "install", "uninstall"),
    *("ls", "inspect", "verify", "scrub", "diff", "extract", "convert"),
}


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (BadConfig("/etc/x", "wrong"), "ckptd: /etc/x: wrong\n"),
        (PermissionError(13, "Permission denied", "/c"), "ckptd: Permission denied /c; check the path and its owner\n"),
        (OSError("odd"), "ckptd: odd; check the path and its owner\n"),
        (KeyboardInterrupt(), "ckptd: interrupted\n"),
        (ValueError("a\nb"), "ckptd: bug: ValueError: a?b; CKPTD_TRACEBACK=1 shows where\n"),
    ],
)
def test_what_goes_wrong_is_one_line(run_cli, monkeypatch, error, line):
    def fail(_):
        raise error

    monkeypatch.delenv("CKPTD_TRACEBACK", raising=False)
    monkeypatch.setattr(cli, "_run", fail)
    assert run_cli("status") == (130 if isinstance(error, KeyboardInterrupt) else 1, "", line)


def test_a_bugs_traceback_is_shown_on_demand(monkeypatch):
    def fail(_):
        raise ValueError("x")

    monkeypatch.setenv("CKPTD_TRACEBACK", "1")
    monkeypatch.setattr(cli, "_run", fail)
    with pytest.raises(ValueError, match="x"):
        cli.main()


def test_ctrl_c_in_a_command_is_no_traceback(run_cli, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("ckptd.daemon.cli.status.fetch_status", interrupted)
    code, out, err = run_cli("status")
    assert (code, out) == (130, "")
    assert "Traceback" not in err


def test_every_command_has_one_line_of_help(run_cli):
    code, out, _ = run_cli("--help")
    assert code == 0
    listed = {line.split()[0]: line.split(maxsplit=1)[1] for line in out.partition("Commands:\n")[2].splitlines()}
    assert set(listed) == COMMANDS
    assert "Exit status: 0 done, 1 failed or not good, 2 wrong usage, 130" in out


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_explains_itself_and_speaks_json(run_cli, name):
    code, out, _ = run_cli(name, "--help")
    assert code == 0
    assert ("--json" in out) == (name != "serve"), "a daemon has nothing to print"


@pytest.mark.parametrize(
    "arguments",
    [
        ("top", "--interval", "0"),
        ("drain", "--timeout", "-1"),
        ("drain", "--timeout", "inf"),
        ("gc", "--older-than", "soon"),
        ("bench", "--mib", "0"),
        ("doctor", "a", "b"),
        ("install", "--nowhere"),
    ],
)
def test_wrong_values_are_wrong_usage(run_cli, arguments):
    code, out, err = run_cli(*arguments)
    assert (code, out) == (2, "")
    assert "Traceback" not in err


def complete(words, **more):
    variables = {"_CKPTD_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    ran = subprocess.run(
        [CKPTD], env={**os.environ, **variables, **more}, capture_output=True, text=True, check=False, timeout=60
    )
    assert ran.stderr == ""
    return sorted(ran.stdout.split())


def test_the_shell_completes_commands_and_options():
    assert complete("ckptd in") == ["inspect", "install"]
    assert complete("ckptd drain --t") == ["--timeout"]


@pytest.mark.parametrize(
    ("shell", "word"), [("bash", "complete -o default -F"), ("zsh", "compdef"), ("fish", "complete")]
)
def test_completion_is_generated_for_shells(shell, word):
    ran = subprocess.run(
        [CKPTD],
        env={**os.environ, "_CKPTD_COMPLETE": f"source_{shell}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert word in ran.stdout
    assert "_CKPTD_COMPLETE" in ran.stdout


def test_no_command_is_forgotten_here():
    assert {command.callback.__name__ for command in commands.app.registered_commands} == COMMANDS
