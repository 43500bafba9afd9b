"""What unit tests of commands share."""

from support.cli import run_cli  # noqa: F401
