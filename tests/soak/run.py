"""`make soak`: 2,000 saves of a small changing model, with trainers, workers and daemons killed at random.

    run.py [--saves 2000] [--seed 1]

Ends with status 1 at the first invariant that does not hold, or if a resource has grown.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.daemons import Runtime
from support.soaking import Soak, leftovers
from support.trainers import Nursery

# Between the first and the last third of a soak; allocators and caches settle in the first.
_MAY_GROW_BYTES = 8 << 20
_MAY_GROW_DESCRIPTORS = 4


def main() -> int:
    """Soak and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    runtime, nursery = Runtime(), Nursery()
    with tempfile.TemporaryDirectory(prefix="ckptd-soak-") as directory:
        soak = Soak(runtime, nursery, Path(directory, "runs"), seed=arguments.seed)
        figures = soak.run(arguments.saves, on_save=_show)
        soak.close()
        left = leftovers(runtime)
    nursery.close()
    runtime.close()
    print(f"\n{figures.saves} saves in {figures.seconds:.0f} s, seed {arguments.seed}")
    for title, counter in (("what was killed, and when", figures.events), ("how it ended", figures.outcomes)):
        print(f"\n{title}:")
        for name, count in sorted(counter.items()):
            print(f"  {count:5d}  {name}")
    grown = False
    print("\nlargest value at quiet moments, first third -> last third:")
    for name in ("daemon_rss_bytes", "daemon_descriptors", "shm_bytes", "journal_bytes"):
        first, last = figures.growth(name)
        grown |= last > first + (_MAY_GROW_DESCRIPTORS if name == "daemon_descriptors" else _MAY_GROW_BYTES)
        print(f"  {name}: {first} -> {last}")
    print(f"\nleft over: {left or 'nothing'}; lost, torn, mixed or wrong: 0")
    return 1 if left or grown else 0


def _show(number: int) -> None:
    if number % 100 == 0:
        print(f"{number} saves", flush=True)


if __name__ == "__main__":
    sys.exit(main())
