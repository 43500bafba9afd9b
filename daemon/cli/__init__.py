"""The ``ckptd`` command: run and look after the daemon, and look into checkpoints without it.

Exit status: 0 done, 1 failed, not good or different, 2 wrong usage, 130 interrupted. What goes wrong is one line on
stderr, never a traceback; CKPTD_TRACEBACK=1 shows where a bug is. A module for each command; what it needs is imported
when it runs.
"""

from __future__ import annotations

import os
import sys
from typing import Final

from ckptd.daemon.cli.output import complain
from ckptd.protocol.errors import CkptdError, UnexpectedError

# As shells report an end by SIGINT, and typer does. Source: POSIX, Shell Command Language, 2.8.2.
_INTERRUPTED: Final = 130


def main() -> None:
    """Run the command line; the entry point of ``ckptd``."""
    try:
        status = _run(sys.argv[1:])
        sys.stdout.flush()
        sys.exit(status)
    except CkptdError as error:
        complain(error)
    except BrokenPipeError:  # `ckptd ls | head`
        # Python flushes at its end once more. Source: docs.python.org, library/signal, "Note on SIGPIPE".
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.stderr.write("ckptd: interrupted\n")
        sys.exit(_INTERRUPTED)
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        complain(UnexpectedError(f"{error.strerror or error}{where}; check the path and its owner"))
    except Exception as bug:  # whoever runs a command is told in one line, too
        if os.environ.get("CKPTD_TRACEBACK"):
            raise
        complain(UnexpectedError(f"bug: {type(bug).__name__}: {bug}; CKPTD_TRACEBACK=1 shows where"))
    sys.exit(1)


def _run(arguments: list[str]) -> int | None:
    """Run a command, and return its exit status unless it has ended the process by itself."""
    if arguments[:1] == ["ls"] and not any(word.startswith("-") and word != "--json" for word in arguments):
        paths = [word for word in arguments[1:] if word != "--json"]
        if paths:  # nothing for typer to explain: its import would double the time; see listing
            # No matrices are multiplied here; numpy's library would start a thread for each core.
            os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
            from ckptd.daemon.cli.listing import list_paths

            return list_paths(paths, as_json="--json" in arguments)
    from ckptd.daemon.cli.app import app

    app(prog_name="ckptd")
    return None
