"""The offline commands: what they print, their exit status, and one line for whatever is wrong."""

from __future__ import annotations

import json
import os
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.states import assert_same
from support.stock import load_stock, save_stock

from ckptd.checkpoint.verify import verify_checkpoint
from ckptd.daemon import cli

STATE = {
    "model": {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)},
    "step": 7,
    "groups": [{"lr": 0.1}],
}


@pytest.fixture
def run(monkeypatch, capsys):
    """Run ``ckptd`` with arguments; return its exit status, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["ckptd", *map(str, arguments)])
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return caught.value.code or 0, out, err

    return run


@pytest.fixture
def stock(tmp_path):
    boxes = {"model.w": [((0, 0), (1, 3)), ((1, 0), (1, 3))]}
    save_stock(STATE, tmp_path / "step-1", boxes=boxes, files=2)
    return tmp_path / "step-1"


@pytest.fixture
def ours(stock, run):
    assert run("convert", stock, stock.parent / "ours-1")[0] == 0
    return stock.parent / "ours-1"


def one_line(err):
    assert err.startswith("ckptd: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


class TestLs:
    def test_a_folder_is_listed_with_what_can_be_told(self, run, stock, ours):
        (stock.parent / ".step-2.ckptd-abc").mkdir()
        (stock.parent / ".step-2.ckptd-abc" / "__0_0.distcp").touch()
        code, out, err = run("ls", stock.parent)
        assert (code, err) == (0, "")
        head, *rows = out.splitlines()
        assert head.split() == ["CHECKPOINT", "BYTES", "TENSORS", "RANKS", "SAVED", "BY", "STATE"]
        assert [(row.split()[0].removeprefix(f"{stock.parent}/"), row.split()[-1]) for row in rows] == [
            *[(".step-2.ckptd-abc", "unfinished"), ("ours-1", "complete"), ("step-1", "complete")],
        ]
        assert "torch.distributed.checkpoint" in rows[2]

    @pytest.mark.parametrize("kind", ["stock", "ours"])
    def test_a_checkpoint_is_listed_with_its_entries(self, run, stock, ours, kind):
        path = {"stock": stock, "ours": ours}[kind]
        code, out, err = run("ls", path)
        assert (code, err) == (0, "")
        first, _, *rows = out.splitlines()
        assert first.startswith(f"{path}: 2 tensors, 2 objects, ")
        assert [row.split() for row in rows] == [
            ["model.w", "float32", "2x3", "24"],
            ["model.b", "bfloat16", "2", "4"],
            ["step", "object", "-", "-"],
            ["groups.0.lr", "object", "-", "-"],
        ]

    def test_as_json(self, run, stock):
        code, out, _ = run("ls", "--json", stock)
        told = json.loads(out)
        assert (code, told["faults"]) == (0, [])
        (checkpoint,) = told["checkpoints"]
        assert checkpoint["state"] == "complete"
        assert checkpoint["entries"][0] == {
            **{"name": "model.w", "dtype": "float32", "shape": [2, 3], "bytes": 24, "chunks": 2},
        }

    @pytest.mark.parametrize("suffix", ["pt", "safetensors"])
    def test_other_formats_are_listed_too(self, run, stock, tmp_path, suffix):
        target = tmp_path / f"x.{suffix}"
        assert run("convert", stock, target, "--tensors-only")[0] == 0
        code, out, _ = run("ls", target)
        assert code == 0
        assert "model.w  float32" in out

    def test_the_good_are_listed_beside_the_damaged(self, run, stock, tmp_path):
        save_stock(STATE, tmp_path / "step-2")
        (tmp_path / "step-2" / ".metadata").write_bytes(b"\x80\x02cposix\nsystem\nX\x02\0\0\0ls\x85R.")
        code, out, err = run("ls", tmp_path)
        assert code == 1
        assert [row.split()[-1] for row in out.splitlines()[1:]] == ["complete", "damaged"]
        assert "forbidden class posix.system" in one_line(err)

    def test_nothing_there(self, run, tmp_path):
        code, out, err = run("ls", tmp_path / "nothing")
        assert (code, out) == (1, "")
        assert "no checkpoint" in one_line(err)
        assert run("ls", tmp_path)[0] == 1

    @pytest.mark.parametrize("arguments", [("ls",), ("ls", "--jsno", "x"), ("ls", "--json")])
    def test_wrong_usage(self, run, arguments):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert "Traceback" not in err

    def test_typer_leads_to_the_same_listing(self, run, stock):
        assert run("ls", "--", stock) == run("ls", stock)
        assert run("ls", "--help")[0] == 0


class TestInspect:
    def test_the_whole(self, run, ours):
        code, out, err = run("inspect", ours)
        assert (code, err) == (0, "")
        for line in ("origin: ckptd convert", "tensors: 2", "objects: 2", "bytes: 28", "  float32: 24", "hashes: yes"):
            assert line in out.splitlines()
        assert json.loads(run("inspect", ours, "--json")[1])["header"]["world_size"] == "2"

    def test_an_entry_with_its_places_and_hashes(self, run, ours):
        told = json.loads(run("inspect", ours, "model.w", "--json")[1])
        assert (told["dtype"], told["shape"], told["bytes"]) == ("float32", [2, 3], 24)
        assert [chunk["offsets"] for chunk in told["chunks"]] == [[0, 0], [1, 0]]
        for row, chunk in enumerate(told["chunks"]):
            with open(chunk["file"], "rb") as file:
                file.seek(chunk["offset"])
                assert file.read(12) == STATE["model"]["w"][row].numpy().tobytes()
            assert len(chunk["xxh3_64"]) == 16
        out = run("inspect", ours, "model.w")[1]
        assert told["chunks"][0]["xxh3_64"] in out

    @pytest.mark.parametrize("kind", ["stock", "ours"])
    def test_values_and_statistics(self, run, stock, ours, kind):
        path = {"stock": stock, "ours": ours}[kind]
        told = json.loads(run("inspect", path, "model.w", "--stats", "--json")[1])["statistics"]
        assert (told["min"], told["max"], told["mean"], told["elements"]) == (0, 5, 2.5, 6)
        assert "mean: 2.5" in run("inspect", path, "model.w", "--stats")[1]
        assert json.loads(run("inspect", path, "step", "--json")[1])["value"] == "7"

    def test_other_formats(self, run, stock, tmp_path):
        assert run("convert", stock, tmp_path / "x.pt")[0] == 0
        assert "format: torch" in run("inspect", tmp_path / "x.pt")[1]
        assert json.loads(run("inspect", tmp_path / "x.pt", "step", "--json")[1])["value"] == "7"

    @pytest.mark.parametrize(
        ("arguments", "code", "reason"),
        [
            (("nokey",), 1, "Missing key in checkpoint state_dict: nokey"),
            (("step", "--stats"), 1, "no tensor"),
            (("--stats",), 2, "name the tensor"),
        ],
    )
    def test_what_cannot_be_told(self, run, stock, arguments, code, reason):
        found, _, err = run("inspect", stock, *arguments)
        assert found == code
        assert reason in err


class TestDiff:
    def test_the_same(self, run, stock, ours):
        assert run("diff", stock, ours) == (0, "", "")
        told = json.loads(run("diff", stock, ours, "--json")[1])
        assert told == {"same": True, "left": str(stock), "right": str(ours), "differences": []}

    def test_each_difference_is_a_line(self, run, stock, tmp_path):
        w = STATE["model"]["w"].clone()
        w[1, 1] += 2
        save_stock({"model": {"w": w, "b": torch.ones(3)}, "step": 8, "new": torch.ones(1)}, tmp_path / "b")
        code, out, err = run("diff", stock, tmp_path / "b")
        assert (code, err) == (1, "")
        assert out.splitlines() == [
            "~ model.w: float32[2, 3], 1 elements differ, by 2 at most",
            "! model.b: bfloat16[2] -> float32[3]",
            "~ step: 7 -> 8",
            "- groups.0.lr: object",
            "+ new: float32[1]",
        ]
        assert run("diff", stock, tmp_path / "b", "-q") == (1, "", "")
        assert "model.w" not in run("diff", stock, tmp_path / "b", "--no-values")[1]
        told = json.loads(run("diff", stock, tmp_path / "b", "--json")[1])
        assert told["differences"][0] == {
            **{"name": "model.w", "kind": "value", "left": "float32[2, 3]", "right": "float32[2, 3]"},
            **{"elements": 1, "largest": 2.0},
        }

    def test_names_cannot_steer_the_terminal(self, run, stock, tmp_path):
        save_stock({"\x1b[2J\n": torch.ones(1)}, tmp_path / "b")
        assert "+ ?[2J?: float32[1]" in run("diff", stock, tmp_path / "b")[1].splitlines()
        assert "?[2J?" in run("ls", tmp_path / "b")[1]


class TestConvertAndExtract:
    def test_there_and_back(self, run, stock, tmp_path):
        code, out, err = run("convert", stock, tmp_path / "x.pt")
        assert (code, err) == (0, "")
        assert out == f"{tmp_path}/x.pt: torch, 2 tensors of 28 bytes, 2 objects\n"
        assert_same(torch.load(tmp_path / "x.pt"), load_stock(stock))
        told = json.loads(run("convert", tmp_path / "x.pt", tmp_path / "back", "--json")[1])
        assert (told["format"], told["tensors"], told["objects"], told["bytes"]) == ("dcp", 2, 2, 28)
        assert verify_checkpoint(str(tmp_path / "back")).good
        assert run("diff", stock, tmp_path / "back") == (0, "", "")

    def test_to_a_folder_of_safetensors(self, run, stock, tmp_path):
        arguments = ("convert", stock, tmp_path / "hf", "--to", "safetensors", "--tensors-only", "--shard-size", "25B")
        assert run(*arguments)[0] == 0
        assert len(list((tmp_path / "hf").glob("*.safetensors"))) == 2
        assert run("diff", tmp_path / "hf", stock)[1].splitlines() == ["+ step: object", "+ groups.0.lr: object"]

    def test_some_entries(self, run, stock, tmp_path):
        assert run("extract", stock, "model", "-o", tmp_path / "x.safetensors")[0] == 0
        assert list(load_file(tmp_path / "x.safetensors")) == ["model.w", "model.b"]
        told = json.loads(run("extract", stock, "model.w", "-o", tmp_path / "x.npy", "--json")[1])
        assert told["entries"] == ["model.w"]
        np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), STATE["model"]["w"].numpy())

    @pytest.mark.parametrize(
        ("arguments", "code", "reason"),
        [
            (("convert", "step-1", "x.foo"), 2, "tells no format; give one with --to"),
            (("convert", "step-1", "taken.pt"), 1, "exists already; choose another name, or replace it"),
            (("convert", "nothing", "x.pt"), 1, "No such file"),
            (("convert", "text", "x.pt"), 1, "neither a torch.save nor a safetensors file"),
            (("convert", "step-1", "step-1/inner"), 1, "choose another place"),
            (("convert", "step-1", "x.safetensors"), 1, "leave them out with --tensors-only"),
            (("convert", "step-1", "no/folder/x.pt"), 1, "No such file"),
            (("extract", "step-1", "nokey", "-o", "x.pt"), 1, "nokey"),
            (("extract", "step-1", "step", "-o", "x.npy"), 1, "one tensor"),
        ],
    )
    def test_refusals_are_one_line_and_leave_nothing(self, run, stock, tmp_path, monkeypatch, arguments, code, reason):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "taken.pt").write_bytes(b"mine")
        (tmp_path / "text").write_text("a text that is no checkpoint")
        before = sorted(os.listdir(tmp_path)), sorted(os.listdir(stock))
        found, out, err = run(*arguments)
        assert (found, out) == (code, "")
        assert reason in one_line(err)
        assert (sorted(os.listdir(tmp_path)), sorted(os.listdir(stock))) == before
        assert (tmp_path / "taken.pt").read_bytes() == b"mine"

    @pytest.mark.parametrize("size", ["5X", "0", "G", "-1"])
    def test_sizes_that_are_none(self, run, stock, tmp_path, size):
        code, _, err = run("convert", stock, tmp_path / "hf", "--to", "safetensors", f"--shard-size={size}")
        assert code == 2
        assert "is no size" in err

    def test_overwrite(self, run, stock, tmp_path):
        (tmp_path / "x.pt").write_bytes(b"old")
        assert run("convert", stock, tmp_path / "x.pt", "--overwrite")[0] == 0
        assert run("diff", stock, tmp_path / "x.pt", "-q")[0] == 0


def test_bars_are_drawn_where_somebody_looks(run, stock, tmp_path, monkeypatch):
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda _: True)
    assert run("convert", stock, tmp_path / "x.pt")[0] == 0
    assert run("diff", stock, tmp_path / "x.pt")[0] == 0
    assert run("extract", stock, "model.w", "-o", tmp_path / "x.npy")[0] == 0


def test_output_is_unicode_or_escaped_but_never_an_error(run, tmp_path):
    save_stock({"nämé": torch.ones(1)}, tmp_path / "a")
    assert "nämé" in run("ls", tmp_path / "a")[1]
    out = run("ls", tmp_path / "a", "--json")[1]
    assert out.isascii()
    assert json.loads(out)["checkpoints"][0]["entries"][0]["name"] == "nämé"
