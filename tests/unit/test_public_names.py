"""Every public name of torch's package is in `ckptd.client`, with torch's parameters, and the documentation says so."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import torch.distributed.checkpoint as stock
import torch.distributed.checkpoint.state_dict as stock_state_dict

import ckptd.client as ours

NAMES = (Path(__file__).parents[2] / "docs" / "names.md").read_text(encoding="utf-8")
ROWS = [
    row
    for row in re.findall(r"^\| `(\w+)` \| (.*) \| (ours|torch's) \|$", NAMES, re.MULTILINE)
    if importlib.util.find_spec(f"{stock.__name__}.{row[0]}") is not None  # some are of later versions of torch
]
OURS = {
    "CheckpointException",
    "DefaultSavePlanner",
    "DefaultLoadPlanner",
    "FileSystemReader",
    "FileSystemWriter",
    "FsspecReader",
    "FsspecWriter",
    "load_sharded_optimizer_state_dict",
    "load",
    "load_state_dict",
    "async_save",
    "save",
    "save_state_dict",
    "dcp_to_torch_save",
    "torch_save_to_dcp",
    "BroadcastingTorchSaveReader",
    "DynamicMetaLoadPlanner",
    "create_default_local_save_plan",
    "create_default_global_save_plan",
    "create_default_local_load_plan",
    "create_default_global_load_plan",
}


# Private up to torch 2.14, and used all the same.
FSSPEC = "_fsspec_filesystem"


def submodules():
    names = [found.name for found in pkgutil.iter_modules(stock.__path__)]
    names = [name for name in names if not name.startswith("_") or name == FSSPEC]
    return {name: importlib.import_module(f"{stock.__name__}.{name}") for name in names}


SUBMODULES = submodules()
PUBLIC = {name: getattr(module, name) for module in SUBMODULES.values() for name in getattr(module, "__all__", [])}
PACKAGE = [name for name in vars(stock) if not name.startswith("_") and name not in SUBMODULES]


def test_torchs_package_has_the_names_that_users_know():
    assert {"save", "load", "async_save", "DefaultSavePlanner", "FileSystemReader", "StorageWriter"} <= set(PACKAGE)
    assert len(PACKAGE) >= 25
    assert set(PACKAGE) <= set(PUBLIC)
    assert len(PUBLIC) >= 60


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_here_and_is_torchs_own_object_unless_it_is_ours(name):
    assert name in ours.__all__
    assert (getattr(ours, name) is PUBLIC[name]) is (name not in OURS)


def test_what_is_announced_is_there_and_nothing_is_announced_twice():
    assert len(set(ours.__all__)) == len(ours.__all__)
    assert [name for name in ours.__all__ if not hasattr(ours, name)] == []


@pytest.mark.parametrize("name", sorted(OURS))
def test_torchs_parameters_come_first_with_their_names_kinds_and_defaults(name):
    mine = list(inspect.signature(getattr(ours, name)).parameters.values())
    theirs = list(inspect.signature(PUBLIC[name]).parameters.values())
    several = {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
    named = [p for p in theirs if p.kind not in several]
    if name == "FsspecWriter":  # by keyword only here: torch put it in the middle of the others in 2.15
        named = [p for p in named if p.name != "cache_staged_state_dict"]
    assert [(p.name, p.kind, shown(p.default)) for p in mine[: len(named)]] == [
        (p.name, p.kind, shown(p.default)) for p in named
    ]
    assert {p.kind for p in mine[len(named) :]} <= {inspect.Parameter.KEYWORD_ONLY, *several}
    assert {p.kind for p in theirs} & several <= {p.kind for p in mine}


def shown(default):
    """Return a default so that one compares equal with that of another library."""
    return (type(default).__name__, default.value) if hasattr(default, "value") else default


@pytest.mark.parametrize("name", ["FileSystemReader", "FileSystemWriter", "FsspecReader", "FsspecWriter"])
def test_readers_and_writers_have_torchs_methods(name):
    mine, theirs = getattr(ours, name), PUBLIC[name]
    public = [method for method in dir(theirs) if not method.startswith("_") and callable(getattr(theirs, method))]
    assert len(public) >= 6
    for method in public:
        one, other = (inspect.signature(getattr(kind, method)).parameters for kind in (mine, theirs))
        assert list(one)[: len(other)] == list(other) or "kwargs" in one, method


def test_bases_are_torchs_so_that_isinstance_goes_on_working(tmp_path):
    assert issubclass(ours.DefaultSavePlanner, stock.SavePlanner)
    assert issubclass(ours.DefaultLoadPlanner, stock.LoadPlanner)
    assert isinstance(ours.FileSystemWriter(tmp_path), stock.StorageWriter)
    assert isinstance(ours.FileSystemReader(tmp_path), stock.StorageReader)
    assert issubclass(ours.CheckpointException, stock.CheckpointException)
    assert issubclass(ours.CheckpointException, Exception)


def test_the_state_dict_helpers_are_a_module_in_both():
    for name in stock_state_dict.__all__:
        assert getattr(ours.state_dict, name) is getattr(stock_state_dict, name)
        assert name in ours.state_dict.__all__


class TestTheTable:
    def test_names_every_public_name_of_every_submodule(self):
        told = {(module, name) for module, names, _ in ROWS for name in re.findall(r"`(\w+)`", names)}
        wanted = {(module, name) for module, found in SUBMODULES.items() for name in getattr(found, "__all__", [])}
        assert wanted <= told

    @pytest.mark.parametrize(("module", "names", "whose"), ROWS, ids=[f"{row[0]}-{row[2]}" for row in ROWS])
    def test_is_right_about_whose_they_are(self, module, names, whose):
        theirs = importlib.import_module(f"{stock.__name__}.{module}")
        for name in re.findall(r"`(\w+)`", names):
            assert name in ours.__all__
            assert (getattr(ours, name) is getattr(theirs, name)) is (whose == "torch's"), name

    def test_names_what_is_ours_alone(self):
        section = NAMES.split("## What else is in", 1)[1].split("\n## ", 1)[0]
        told = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.*?) \|", section, re.MULTILINE))))
        extensions = {"Extension", "ExtensionRegistry", "StreamTransformExtension", "ZStandard"}
        assert told - {"name"} == set(ours.__all__) - set(PUBLIC) - extensions - {"state_dict"}
