"""Has each torch version write checkpoints, with ckptd and with stock, and every one read them. See the Makefile.

Each version gets a virtual environment of its own in a temporary directory, which is removed at the end. Needs the
network, gigabytes of disk (all wheels but those ending in "+cpu" bring CUDA) and some minutes.

    run.py [--environments DIR] VERSION...      "here" is the torch of this interpreter
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
EXCHANGE = Path(__file__).with_name("exchange.py")
# What changes with torch's metadata and tensors, and runs without a daemon.
UNIT_TESTS = [
    "chunks",
    "metadata",
    "metadata_pickle",
    "metadata_unpickle",
    "dtypes",
    "flatten",
    "snapshot",
    "load_plan",
]
# A wheel of gigabytes over a slow line; everything else is done in seconds.
_INSTALL_S = 1800
_RUN_S = 300


@dataclass(frozen=True)
class Version:
    """A torch that can be run: its number, its interpreter, and where its checkpoints are."""

    number: str
    python: str
    directory: Path

    def run(self, *arguments, timeout_s=_RUN_S, check=True):
        """Run the interpreter, with a daemon of its own if it wants one; return what it printed."""
        environment = {**os.environ, "CKPTD_RUNTIME_DIR": str(self.directory / "run"), "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = str(REPOSITORY / "tests")
        environment["CKPTD_STATE_DIR"] = str(self.directory / "run" / "state")
        command = [self.python, *map(str, arguments)]
        done = subprocess.run(
            command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        if check and done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        return done.stdout


def install(number, environments, directory):
    """Make the environment of a version, if it is not there; with torch's own requirements only where it needs them."""
    place = Path(environments, f"torch-{number}")
    python = str(place / "bin" / "python")
    if not Path(python).exists():
        project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
        others = [name for name in project["dependencies"] if not name.startswith("torch")]
        others += [
            "setuptools>=77",
            "typing-extensions",
            "sympy",
            "networkx",
            "jinja2",
            "filelock",
            "pytest",
            "hypothesis",
            "fsspec",
            "zstandard",
        ]
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        for command in (
            [sys.executable, "-m", "venv", place],
            [*pip, "--no-deps", f"torch=={number}"],
            [*pip, *others],
            [*pip, "--no-deps", "--editable", REPOSITORY],
        ):
            subprocess.run(command, check=True, timeout=_INSTALL_S)
        found = subprocess.run([python, "-c", "import torch"], capture_output=True, text=True, check=False)
        if found.returncode:
            print(f"torch {number} needs CUDA's libraries: {found.stderr.strip().splitlines()[-1]}", flush=True)
            subprocess.run([*pip, f"torch=={number}"], check=True, timeout=_INSTALL_S)
    return _version(python, directory)


def _version(python, directory):
    found = Version("", python, Path(directory)).run(EXCHANGE, "version").strip()
    mine = Path(directory, found)
    (mine / "run").mkdir(parents=True)
    return Version(found, python, mine)


def exchange(versions):
    """Return the rows of the table: who wrote, and what each reader made of it; and all that was wrong."""
    for version in versions:
        version.run(EXCHANGE, "write", version.directory)
    rows, wrong = {}, []
    for reader in versions:
        for writer in versions:
            for line in reader.run(EXCHANGE, "read", writer.directory).splitlines():
                who, _, outcome = line.partition(": ")
                library, layout, with_what = who.split()
                cell = rows.setdefault((f"{library} {writer.number}", layout), {})
                cell[f"{with_what} {reader.number}"] = outcome
                if outcome != "ok":
                    wrong.append(
                        (
                            library,
                            with_what,
                            f"{with_what} {reader.number} of {library} {writer.number}, {layout}: {outcome}",
                        )
                    )
    return rows, wrong


def table(rows):
    """Return the rows as a table in Markdown."""
    readers = sorted({reader for cells in rows.values() for reader in cells})
    lines = [f"| written by | | {' | '.join(readers)} |", f"| --- | --- {'| --- ' * len(readers)}|"]
    for (writer, layout), cells in sorted(rows.items()):
        told = ["ok" if cells[reader] == "ok" else "**no**" for reader in readers]
        lines.append(f"| {writer} | {layout} | {' | '.join(told)} |")
    return "\n".join(lines)


def main():
    """Exit with 1 if ckptd wrote something that could not be read, or could not read something."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("versions", nargs="+", metavar="VERSION")
    parser.add_argument("--environments", help="keep the environments here, and use those that are there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ckptd-cross-") as directory:
        environments = arguments.environments or f"{directory}/environments"
        versions = {}
        for number in arguments.versions:
            found = (
                _version(sys.executable, directory) if number == "here" else install(number, environments, directory)
            )
            versions[found.number] = found
        rows, wrong = exchange(list(versions.values()))
        print(f"{datetime.datetime.now(tz=datetime.UTC).date()}, Python {platform.python_version()}\n\n{table(rows)}\n")
        for _, _, line in wrong:
            print(line)
        tests = [f"tests/unit/test_{name}.py" for name in UNIT_TESTS]
        for number, version in versions.items():
            print(
                f"unit tests, torch {number}:",
                version.run("-m", "pytest", *tests, check=False).strip().splitlines()[-1],
            )
    return int(any("ckptd" in {writer, reader} for writer, reader, _ in wrong))


if __name__ == "__main__":
    sys.exit(main())
