"""Which format a path holds, which one a name asks for, what may be extracted; and output whole or not at all."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.states import assert_same
from support.stock import save_stock

from ckptd.checkpoint.formats import output
from ckptd.checkpoint.formats.convert import Format, Wish, format_named, format_of, open_source
from ckptd.checkpoint.formats.extract import choose, extract
from ckptd.checkpoint.formats.output import new_file
from ckptd.protocol.errors import (
    BadConfig,
    BadFile,
    MissingKeys,
    OutputExists,
    SystemCallFailed,
    UnknownCheckpoint,
    Unsupported,
)

STATE = {
    "model": {"a": {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}, "ab": torch.zeros(1)},
    "half": torch.ones(2, dtype=torch.bfloat16),
    "step": 7,
}


class TestFormats:
    def test_of_what_is_there(self, tmp_path):
        save_stock({"w": torch.ones(1)}, tmp_path / "dcp")
        (tmp_path / "hf").mkdir()
        for path in ("hf/x.safetensors", "odd_name"):
            save_file({"w": torch.ones(1)}, tmp_path / path)
        torch.save({}, tmp_path / "any.name")
        torch.save({}, tmp_path / "old", _use_new_zipfile_serialization=False)
        found = {path: format_of(str(tmp_path / path)) for path in ("dcp", "hf", "odd_name", "any.name", "old")}
        assert found == {
            **{"dcp": Format.DCP, "hf": Format.SAFETENSORS, "odd_name": Format.SAFETENSORS},
            **{"any.name": Format.TORCH, "old": Format.TORCH},
        }

    def test_of_what_is_not(self, tmp_path):
        (tmp_path / "text").write_text("some text that is long enough")
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(BadFile, match=r"neither a torch\.save nor"):
            format_of(str(tmp_path / "text"))
        with pytest.raises(BadFile, match="no regular file"):
            format_of(str(tmp_path / "pipe"))
        with pytest.raises(UnknownCheckpoint):
            format_of(str(tmp_path))
        with pytest.raises(SystemCallFailed, match="No such file"):
            format_of(str(tmp_path / "nothing"))

    @pytest.mark.parametrize(
        ("name", "wanted"),
        [
            *[("a.pt", Format.TORCH), ("a.pth", Format.TORCH), ("b/pytorch_model.bin", Format.TORCH)],
            *[("a.safetensors", Format.SAFETENSORS), ("run/step-7", Format.DCP), ("step.100", Format.DCP)],
            ("run.v2/last/", Format.DCP),
        ],
    )
    def test_named(self, name, wanted):
        assert format_named(name) is wanted

    def test_a_suffix_that_tells_nothing(self):
        with pytest.raises(BadConfig, match=r"\.foo tells no format; give one with --to"):
            format_named("a.foo")


class TestExtract:
    @pytest.fixture
    def source(self, tmp_path):
        save_stock(STATE, tmp_path / "dcp")
        with open_source(str(tmp_path / "dcp")) as source:
            yield source

    @pytest.mark.parametrize(
        ("keys", "names"),
        [
            (["step"], ["step"]),
            (["model.a"], ["model.a.w", "model.a.b"]),
            (["model"], ["model.a.w", "model.a.b", "model.ab"]),
            (["*.b", "half"], ["model.a.b", "half"]),
            (["model.a.w", "model.a"], ["model.a.w", "model.a.b"]),
        ],
    )
    def test_keys_are_names_beginnings_or_patterns(self, source, keys, names):
        assert [entry.name for entry in choose(source, keys)] == names

    def test_a_key_that_names_nothing(self, source):
        with pytest.raises(MissingKeys, match=r"mode.* \(2 in all"):
            choose(source, ["mode", "step", "*x*"])

    def test_to_torch_and_safetensors_as_a_flat_dict(self, source, tmp_path):
        extract(source, choose(source, ["model.a", "step"]), str(tmp_path / "x.pt"), wish=Wish())
        wanted = {"model.a.w": STATE["model"]["a"]["w"], "model.a.b": STATE["model"]["a"]["b"]}
        assert_same(torch.load(tmp_path / "x.pt"), {**wanted, "step": 7})
        extract(source, choose(source, ["model.a"]), str(tmp_path / "x.safetensors"), wish=Wish())
        assert_same(load_file(tmp_path / "x.safetensors"), wanted)

    def test_to_numpy(self, source, tmp_path):
        extract(source, choose(source, ["model.a.w"]), str(tmp_path / "x.npy"), wish=Wish())
        found = np.load(tmp_path / "x.npy")
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, STATE["model"]["a"]["w"].numpy())
        with pytest.raises(OutputExists):
            extract(source, choose(source, ["model.a.b"]), str(tmp_path / "x.npy"), wish=Wish())
        extract(source, choose(source, ["model.a.b"]), str(tmp_path / "x.npy"), wish=Wish(overwrite=True))
        assert np.load(tmp_path / "x.npy").shape == (2,)

    @pytest.mark.parametrize(
        ("keys", "name", "error", "reason"),
        [
            (["model"], "x.npy", BadConfig, "one tensor, not 3"),
            (["step"], "x.npy", BadConfig, "one tensor"),
            (["half"], "x.npy", Unsupported, r"bfloat16 in a \.npy file"),
            (["half"], "x", BadConfig, "end in"),
            (["half"], "x.txt", BadConfig, "tells no format"),
            (["step"], "x.safetensors", Unsupported, "no tensors"),
        ],
    )
    def test_what_a_format_cannot_hold(self, source, tmp_path, keys, name, error, reason):
        with pytest.raises(error, match=reason):
            extract(source, choose(source, keys), str(tmp_path / name), wish=Wish())
        assert [path.name for path in tmp_path.iterdir()] == ["dcp"]


class TestNewFile:
    def test_appears_when_it_is_complete(self, tmp_path):
        with new_file(str(tmp_path / "a"), overwrite=False) as file:
            file.write(b"new")
            assert not (tmp_path / "a").exists()
        assert (tmp_path / "a").read_bytes() == b"new"
        assert [path.name for path in tmp_path.iterdir()] == ["a"]

    def test_another_who_was_faster_is_not_overwritten(self, tmp_path):
        with pytest.raises(OutputExists), new_file(str(tmp_path / "a"), overwrite=False) as file:
            file.write(b"ours")
            (tmp_path / "a").write_bytes(b"theirs")
        assert (tmp_path / "a").read_bytes() == b"theirs"
        assert [path.name for path in tmp_path.iterdir()] == ["a"]

    @pytest.mark.parametrize("exclusive", [True, False])
    def test_a_file_system_that_cannot_rename_without_replacing(self, tmp_path, monkeypatch, exclusive):
        monkeypatch.setattr(output, "rename_new", lambda *_: exclusive and os.rename(*_) is None)
        with new_file(str(tmp_path / "a"), overwrite=False) as file:
            file.write(b"new")
        assert (tmp_path / "a").read_bytes() == b"new"

    @pytest.mark.parametrize("call", ["fsync", "replace"])
    def test_a_failure_leaves_the_old_one(self, tmp_path, monkeypatch, call):
        (tmp_path / "a").write_bytes(b"old")

        def fail(*_):
            raise OSError(errno.ENOSPC, "full")

        monkeypatch.setattr(os, call, fail)
        with pytest.raises(SystemCallFailed, match="No space"), new_file(str(tmp_path / "a"), overwrite=True) as file:
            file.write(b"new")
        assert (tmp_path / "a").read_bytes() == b"old"
        assert [path.name for path in tmp_path.iterdir()] == ["a"]

    def test_a_folder_is_not_replaced_by_a_file(self, tmp_path):
        (tmp_path / "a").mkdir()
        with pytest.raises(SystemCallFailed, match="Is a directory"), new_file(str(tmp_path / "a"), overwrite=True):
            raise AssertionError("must not begin")

    def test_a_folder_that_is_not_there(self, tmp_path):
        with pytest.raises(SystemCallFailed, match="No such file"), new_file(f"{tmp_path}/no/a", overwrite=False):
            raise AssertionError("must not begin")
