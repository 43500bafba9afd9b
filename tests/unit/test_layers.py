"""Imports point down, and no module grows without end. Read from the syntax trees, so that no import is missed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("protocol", "staging", "checkpoint", "daemon", "client")
MAY_IMPORT = {
    "protocol": {"protocol"},
    "staging": {"staging", "protocol"},
    "checkpoint": {"checkpoint", "staging", "protocol"},
    "daemon": {"daemon", "checkpoint", "staging", "protocol"},
    "client": {"client", "checkpoint", "staging", "protocol"},
}
NOT_FOR_PROTOCOL = {"torch", "zmq", "asyncio", "numpy", "uvloop", "aiohttp"}
MOST_LINES = 500


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(("ckptd", *parts)).removesuffix(".__init__")


FILES = {module_name(file): file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))}
TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in FILES.items()}


def imports(name: str) -> set[str]:
    """Return every module that a module imports anywhere in it: lazily and for type checkers, too."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in TREES else node.module)
    return found


modules = pytest.mark.parametrize("name", FILES)


def test_all_folders_are_there():
    assert len(FILES) > 40
    assert {name.split(".")[1] for name in FILES} == set(FOLDERS)


@modules
def test_imports_point_down(name):
    layer = name.split(".")[1]
    ours = {imported.split(".")[1] for imported in imports(name) if imported.startswith("ckptd.")}
    assert ours <= MAY_IMPORT[layer]


@modules
def test_imports_are_absolute_and_by_their_full_name(name):
    for node in ast.walk(TREES[name]):
        assert not (isinstance(node, ast.ImportFrom) and node.level)
    assert not {imported.split(".")[0] for imported in imports(name)} & {*FOLDERS, "root"}


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("ckptd.protocol")])
def test_the_protocol_does_no_input_and_output(name):
    assert not {imported.split(".")[0] for imported in imports(name)} & NOT_FOR_PROTOCOL


def test_no_module_imports_itself_by_a_detour():
    graph = {name: imports(name) & set(TREES) - {name} for name in TREES}
    while leaves := [name for name, needs in graph.items() if not needs]:
        for leaf in leaves:
            del graph[leaf]
        for needs in graph.values():
            needs -= set(leaves)
    assert graph == {}, "these import each other, or modules that do"


@modules
def test_a_file_has_no_more_lines_than_a_reader(name):
    file = FILES[name]
    assert len(file.read_text(encoding="utf-8").splitlines()) < MOST_LINES


def test_no_file_is_named_for_nothing():
    assert not {file.name for file in FILES.values()} & {"utils.py", "common.py", "helpers.py"}


@pytest.mark.parametrize(
    ("imported", "absent"),
    [
        ("ckptd.daemon.service, ckptd.daemon.__main__", ["torch", "numpy", "typer", "rich"]),
        ("ckptd.daemon.workers.worker", ["torch"]),
        ("ckptd.protocol.messages, ckptd.protocol.save, ckptd.protocol.session", ["torch", "numpy", "zmq", "asyncio"]),
    ],
)
def test_a_process_loads_only_what_it_needs(imported, absent):
    """In a process of its own; the only test here that starts one."""
    code = f"import sys, {imported}; print([name for name in {absent!r} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.strip() == "[]"
