"""safetensors files and Hugging Face folders: the library reads ours, we read the library's, and damage is one line."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.states import assert_same, of_every_dtype
from support.stock import load_stock, save_stock

from ckptd.checkpoint.formats.convert import Format, Wish, convert, open_source
from ckptd.checkpoint.formats.safetensors import SafetensorsSource
from ckptd.checkpoint.verify import verify_checkpoint
from ckptd.protocol.errors import (
    BadConfig,
    BadFile,
    MissingFile,
    OutputExists,
    UnknownCheckpoint,
    Unsupported,
)

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support")
NOT_THERE = {"complex32", "complex128", "float4_e2m1fn_x2"}
# What the library for torch reads; it lacks a name for this one.
NOT_READ = NOT_THERE | {"float8_e8m0fnu"}


def states():
    found = {name: tensor for name, tensor in of_every_dtype().items() if name not in NOT_READ}
    return {
        **found,
        "scalar": torch.tensor(2.5),
        "none": torch.empty(0, 3),
        "wide": torch.arange(600.0).reshape(20, 30),
    }


@pytest.fixture
def saved(tmp_path):
    cut = [((0, 0), (20, 11)), ((0, 11), (20, 19))]
    save_stock(states(), tmp_path / "stock", boxes={"wide": cut}, files=2)
    return tmp_path / "stock"


def to_safetensors(source, target, **wish):
    with open_source(str(source)) as opened:
        convert(opened, str(target), Format.SAFETENSORS, wish=Wish(**wish))


def test_the_library_reads_one_file(saved, tmp_path):
    to_safetensors(saved, tmp_path / "a.safetensors")
    assert_same(load_file(tmp_path / "a.safetensors"), states())


def test_values_lie_aligned(saved, tmp_path):
    to_safetensors(saved, tmp_path / "a.safetensors")
    with SafetensorsSource(str(tmp_path / "a.safetensors")) as source:
        assert all(source.position(entry.boxes[0]) % entry.itemsize_bytes == 0 for entry in source.entries)


def test_a_folder_is_cut_as_hugging_face_does(saved, tmp_path):
    to_safetensors(saved, tmp_path / "hf", shard_bytes=300)
    names = sorted(path.name for path in (tmp_path / "hf").iterdir())
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert names == [*shards, "model.safetensors.index.json"]
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert len(shards) > 2
    found = {}
    for shard in shards:
        part = load_file(tmp_path / "hf" / shard)
        assert set(part) == {name for name, file in index["weight_map"].items() if file == shard}
        assert sum(tensor.nbytes for tensor in part.values()) <= 300 or len(part) == 1
        found |= part
    assert_same(found, states())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in states().values())


def test_a_small_folder_is_one_file_without_an_index(saved, tmp_path):
    to_safetensors(saved, tmp_path / "hf")
    assert [path.name for path in (tmp_path / "hf").iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("form", ["file", "folder"])
def test_the_librarys_files_become_a_checkpoint(tmp_path, form):
    state = states()
    if form == "file":
        source = tmp_path / "a.safetensors"
        save_file(state, source, metadata={"any": "thing"})
    else:
        source = tmp_path / "hf"
        source.mkdir()
        names = sorted(state)
        parts = {"x-1.safetensors": names[:5], "x-2.safetensors": names[5:]}
        for file, part in parts.items():
            save_file({name: state[name] for name in part}, source / file)
        weight_map = {name: file for file, part in parts.items() for name in part}
        (source / "x.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with open_source(str(source)) as opened:
        convert(opened, str(tmp_path / "dcp"), Format.DCP)
    assert verify_checkpoint(str(tmp_path / "dcp")).good
    assert_same(load_stock(tmp_path / "dcp"), state)


def test_every_type_that_the_format_has_comes_back(tmp_path):
    state = {name: tensor for name, tensor in of_every_dtype().items() if name not in NOT_THERE}
    save_stock(state, tmp_path / "stock")
    to_safetensors(tmp_path / "stock", tmp_path / "a.safetensors")
    with open_source(str(tmp_path / "a.safetensors")) as opened:
        convert(opened, str(tmp_path / "b.pt"), Format.TORCH)
    assert_same(torch.load(tmp_path / "b.pt", weights_only=True), state)


@pytest.mark.parametrize("name", sorted(NOT_THERE))
def test_other_types_are_refused_by_name(tmp_path, name):
    save_stock({"w": of_every_dtype()[name]}, tmp_path / "stock")
    with pytest.raises(Unsupported, match=f"w: dtype {name} in a safetensors file"):
        to_safetensors(tmp_path / "stock", tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


def test_objects_are_refused_or_left_out(tmp_path):
    save_stock({"w": torch.ones(2), "step": 3, "lr": 0.1}, tmp_path / "stock")
    with pytest.raises(Unsupported, match=r"2 entries that are no tensors \(step \.\.\.\).*--tensors-only"):
        to_safetensors(tmp_path / "stock", tmp_path / "a.safetensors")
    to_safetensors(tmp_path / "stock", tmp_path / "a.safetensors", tensors_only=True)
    assert list(load_file(tmp_path / "a.safetensors")) == ["w"]


class TestOverwrite:
    def test_an_existing_folder_is_exchanged_as_a_whole(self, saved, tmp_path):
        to_safetensors(saved, tmp_path / "hf", shard_bytes=500)
        with pytest.raises(OutputExists):
            to_safetensors(saved, tmp_path / "hf")
        to_safetensors(saved, tmp_path / "hf", overwrite=True)
        assert [path.name for path in (tmp_path / "hf").iterdir()] == ["model.safetensors"]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "stock"]

    def test_a_folder_with_files_of_the_users_is_not_thrown_away(self, saved, tmp_path):
        to_safetensors(saved, tmp_path / "hf")
        (tmp_path / "hf" / "config.json").write_text("{}")
        with pytest.raises(BadConfig, match=r"config\.json, which would be lost"):
            to_safetensors(saved, tmp_path / "hf", overwrite=True)
        assert (tmp_path / "hf" / "config.json").exists()

    def test_a_failure_leaves_the_old_one(self, saved, tmp_path):
        to_safetensors(saved, tmp_path / "hf")
        before = (tmp_path / "hf" / "model.safetensors").read_bytes()
        (saved / "__0_1.distcp").unlink()
        with pytest.raises(MissingFile):
            to_safetensors(saved, tmp_path / "hf", overwrite=True, shard_bytes=100)
        assert (tmp_path / "hf" / "model.safetensors").read_bytes() == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "stock"]


class TestDamage:
    @pytest.fixture
    def file(self, tmp_path):
        save_file({"a": torch.arange(10.0), "b": torch.ones(3)}, tmp_path / "x.safetensors")
        return tmp_path / "x.safetensors"

    @pytest.mark.parametrize("keep", [0, 7, 8, 40, -1])
    def test_a_cut_file(self, file, keep):
        file.write_bytes(file.read_bytes()[:keep])
        with pytest.raises(BadFile, match=r"cut short|cannot be decoded"):
            SafetensorsSource(str(file))

    @pytest.mark.parametrize(
        ("header", "reason"),
        [
            (b"[]", "cannot be decoded"),
            (b"\xff\xfe", "cannot be decoded"),
            (b"[" * 100_000, "cannot be decoded"),
            (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,8]}}', "do not fit"),
            (b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', "cannot be decoded"),
            (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[4000000,4000008]}}', "do not fit"),
            (b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}', "cannot be decoded"),
            (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}', "do not fit"),
        ],
    )
    def test_a_header_that_lies(self, tmp_path, header, reason):
        file = tmp_path / "x.safetensors"
        file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
        with pytest.raises(BadFile, match=reason) as caught:
            SafetensorsSource(str(file))
        assert "\n" not in str(caught.value)

    def test_a_header_longer_than_any(self, tmp_path):
        file = tmp_path / "x.safetensors"
        file.write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
        with pytest.raises(BadFile, match="no safetensors file"):
            SafetensorsSource(str(file))

    def test_a_type_of_the_future(self, tmp_path):
        file = tmp_path / "x.safetensors"
        header = b'{"a":{"dtype":"F6_E2M3","shape":[8],"data_offsets":[0,6]}}'
        file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(6))
        with pytest.raises(Unsupported, match="F6_E2M3"):
            SafetensorsSource(str(file))

    @pytest.mark.parametrize(
        ("index", "error", "reason"),
        [
            ('{"weight_map": {"a": "gone.safetensors"}}', MissingFile, "gone"),
            ('{"weight_map": {"a": "../x.safetensors"}}', BadFile, "outside of its folder"),
            ('{"weight_map": {"z": "y.safetensors"}}', BadFile, "lacks z"),
            ('{"weight_map": 1}', BadFile, "cannot be decoded"),
        ],
    )
    def test_an_index_that_lies(self, tmp_path, index, error, reason):
        folder = tmp_path / "hf"
        folder.mkdir()
        save_file({"a": torch.ones(1)}, folder / "y.safetensors")
        (folder / "model.safetensors.index.json").write_text(index)
        with pytest.raises(error, match=reason):
            SafetensorsSource(str(folder))

    def test_an_empty_folder(self, tmp_path):
        with pytest.raises(UnknownCheckpoint):
            SafetensorsSource(str(tmp_path))

    def test_two_indexes(self, tmp_path):
        for name in "ab":
            (tmp_path / f"{name}.safetensors.index.json").write_text("{}")
        with pytest.raises(BadFile, match="several indexes"):
            SafetensorsSource(str(tmp_path))
