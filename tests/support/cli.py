"""The command line, run in the test's own process."""

from __future__ import annotations

import sys

import pytest

from ckptd.daemon import cli


@pytest.fixture
def run_cli(monkeypatch, capsys):
    """Run ``ckptd`` with arguments; return its exit status, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["ckptd", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return caught.value.code or 0, out, err

    return run
