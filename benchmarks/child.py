"""A child process of the benchmark: measures one thing and prints what it found. Run as ``python -m benchmarks.child``.

Its standard output carries nothing but messages (:mod:`benchmarks.samples`), one a line: what libraries print, gloo for
one, goes to standard error.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from benchmarks.samples import Message, Result, Step

_LIMITS = "limits"
_SOAK = "soak"
_PLANNING = "planning"
_ADOPTION = "adoption"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure one system; see python -m benchmarks.")
    parser.add_argument(
        "--system", required=True, help="ckptd, waves, sync, thread, process, limits, soak, adoption or planning"
    )
    parser.add_argument("--bytes", type=int, required=True)
    parser.add_argument("--tensors", type=int, default=1000)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--slowdowns", type=int, default=0)
    parser.add_argument("--loads", type=int, default=0)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--directory", type=Path, required=True)
    return parser.parse_args()


def _measure(arguments: argparse.Namespace, tell: Callable[[str], None]) -> Result:
    directory: Path = arguments.directory
    if arguments.system == _LIMITS:
        from benchmarks.limits import measure_limits

        return measure_limits(arguments.bytes, directory, repeats=arguments.saves, tell=tell)
    if arguments.system == _PLANNING:
        from benchmarks.planning import measure_planning

        return measure_planning(arguments.tensors, arguments.bytes, directory=directory, tell=tell)
    if arguments.system == _ADOPTION:
        from benchmarks.restore import measure_adoption

        return measure_adoption(arguments.saves, directory, repeats=arguments.loads, tell=tell)
    from benchmarks.systems import SYSTEMS
    from benchmarks.trials import Scope, Trial, soak

    if arguments.system == _SOAK:
        saves, tensors = arguments.saves, arguments.tensors
        return soak(arguments.bytes, tensors, saves=saves, directory=directory, tell=tell)
    scope = Scope(
        nbytes=arguments.bytes,
        tensors=arguments.tensors,
        saves=arguments.saves,
        slowdowns=arguments.slowdowns,
        loads=arguments.loads,
        memory=arguments.memory,
    )
    return Trial(arguments.system, SYSTEMS[arguments.system](), directory, tell).run(scope)


def main() -> None:
    """Measure and print."""
    # As Ctrl-C does: `finally` blocks run, and the daemon is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    messages = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)

    def send(message: Message) -> None:
        messages.write(msgspec.json.encode(message) + b"\n")

    send(_measure(_arguments(), lambda what: send(Step(what=what))))


if __name__ == "__main__":
    main()
