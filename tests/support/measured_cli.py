"""Runs the command line in this process, and tells on stderr what it took: peak memory, time, and what was loaded."""

from __future__ import annotations

import json
import re
import resource
import sys
from pathlib import Path

HEAVY = ("torch", "typer", "rich", "pydantic", "numpy")


def main() -> None:
    from ckptd.daemon.cli import main as run

    try:
        run()
    finally:
        used = resource.getrusage(resource.RUSAGE_SELF)
        # Not ru_maxrss, which begins with what the parent had before exec.
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        facts = {
            "peak_bytes": int(peak[1]) * 1024,
            "cpu_s": used.ru_utime + used.ru_stime,
            "loaded": [name for name in HEAVY if name in sys.modules],
        }
        print(json.dumps(facts), file=sys.stderr)


if __name__ == "__main__":
    main()
