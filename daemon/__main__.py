"""``python -m ckptd.daemon``: the same as ``ckptd serve``, without the command line's libraries in memory."""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import sys

import uvloop

from ckptd.daemon.http.connections import raise_descriptor_limit
from ckptd.daemon.service import Daemon, Mode, Place
from ckptd.daemon.settings.config import Config, default_config_path, load_config
from ckptd.daemon.systemd.managed import log_formatter
from ckptd.protocol.errors import CkptdError
from ckptd.protocol.paths import runtime_dir


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ckptd serve", description="Run the checkpoint daemon of this node.")
    parser.add_argument("--http", metavar="HOST:PORT", help="address of the HTTP endpoint; port 0 takes any")
    parser.add_argument("--mode", choices=["auto", "embedded", "user", "system"], default="auto")
    return parser.parse_args()


def _mode(wanted: str) -> Mode:
    if wanted == "auto":
        return "system" if os.geteuid() == 0 else "user"
    return wanted  # type: ignore[return-value]  # argparse has checked it


async def _serve(config: Config, place: Place) -> None:
    await Daemon(config, place).run()


def main() -> int:
    """Serve until told to stop; return the exit status."""
    arguments = _arguments()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(log_formatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    faulthandler.enable()  # a watchdog's SIGABRT leaves in the log where the daemon hung
    try:
        mode = _mode(arguments.mode)
        config = load_config(default_config_path(mode))
        raise_descriptor_limit()
        place = Place(runtime_dir(), arguments.http or config.http, mode)
        uvloop.run(_serve(config, place))
    except CkptdError as error:
        print(f"ckptd: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
