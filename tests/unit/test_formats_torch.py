"""torch.save files: what we write is what stock would, what we read is what it wrote, and no pickle runs unasked."""

from __future__ import annotations

import collections
import os
import pathlib
import zipfile

import pytest
import torch
from support.states import assert_same, everything
from support.stock import load_stock, save_stock
from torch.distributed.checkpoint import format_utils as stock

from ckptd.checkpoint.formats import torch_source
from ckptd.checkpoint.formats.convert import Format, Wish, convert, open_source
from ckptd.checkpoint.formats.torch_save import dcp_to_torch_save, torch_save_to_dcp
from ckptd.checkpoint.formats.torch_source import TorchSource
from ckptd.checkpoint.formats.torch_target import set_path
from ckptd.checkpoint.verify import verify_checkpoint
from ckptd.protocol.errors import BadFile, OutputExists, SystemCallFailed, Unsupported

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support", "ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save_stock(everything(3), folder / "stock")
    return folder


def test_a_dcp_checkpoint_becomes_what_stock_makes_of_it(saved, tmp_path):
    dcp_to_torch_save(saved / "stock", tmp_path / "ours.pt")
    wanted = load_stock(saved / "stock")
    for options in ({}, {"mmap": True}):
        found = torch.load(tmp_path / "ours.pt", weights_only=False, **options)
        assert_same(found, wanted)
        assert list(found) == list(wanted)
    assert not found["grad"].requires_grad
    assert not wanted["grad"].requires_grad


def test_a_file_becomes_a_dcp_checkpoint_that_both_read(saved, tmp_path):
    torch.save(everything(5), tmp_path / "a.pt")
    torch_save_to_dcp(tmp_path / "a.pt", str(tmp_path / "ours"))
    stock.torch_save_to_dcp(tmp_path / "a.pt", tmp_path / "theirs")
    report = verify_checkpoint(str(tmp_path / "ours"))
    assert report.good
    assert report.hashes_checked
    assert_same(load_stock(tmp_path / "ours"), load_stock(tmp_path / "theirs"))


def test_existing_output_is_replaced_as_stock_does(saved, tmp_path):
    (tmp_path / "a.pt").write_bytes(b"old")
    dcp_to_torch_save(saved / "stock", tmp_path / "a.pt")
    torch_save_to_dcp(tmp_path / "a.pt", tmp_path / "dcp")
    torch.save({"only": torch.ones(2)}, tmp_path / "b.pt")
    torch_save_to_dcp(tmp_path / "b.pt", tmp_path / "dcp")
    assert list(load_stock(tmp_path / "dcp")) == ["only"]


def test_the_archive_is_sound_and_its_values_are_aligned(saved, tmp_path):
    dcp_to_torch_save(saved / "stock", tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert archive.testzip() is None  # checks every CRC
        assert {member.filename.split("/")[0] for member in archive.infolist()} == {"a"}
    reader = torch._C.PyTorchFileReader(str(tmp_path / "a.pt"))
    data = [name for name in reader.get_all_records() if name.startswith("data/")]
    assert len(data) > 20
    assert {reader.get_record_offset(name) % 64 for name in data} == {0}


def test_plain_content_loads_with_weights_only(tmp_path):
    state = {"w": torch.arange(6.0).reshape(2, 3), "f8": torch.ones(3).to(torch.float8_e4m3fn), "lr": 0.1, "n": [1, 2]}
    save_stock(state, tmp_path / "stock")
    with open_source(str(tmp_path / "stock")) as source:
        convert(source, str(tmp_path / "a.pt"), Format.TORCH)  # without trust
    assert_same(torch.load(tmp_path / "a.pt", weights_only=True), state)


def test_tensors_inside_objects_come_along(tmp_path):
    shared = torch.arange(4.0)
    state = {"pair": (shared, shared[1:], torch.ones(2, dtype=torch.uint16)), "w": torch.zeros(3)}
    save_stock(state, tmp_path / "stock")
    dcp_to_torch_save(tmp_path / "stock", tmp_path / "a.pt")
    one, part, wide = torch.load(tmp_path / "a.pt", weights_only=True)["pair"]
    assert torch.equal(one, shared)
    assert torch.equal(wide, torch.ones(2, dtype=torch.uint16))
    assert part.untyped_storage().data_ptr() == one.untyped_storage().data_ptr()


class TestAFileAsSource:
    def test_values_are_read_past_the_map(self, tmp_path, monkeypatch):
        path = tmp_path / "with space.pt"
        torch.save({"w": torch.arange(1000.0), "v": torch.arange(10)[3:]}, path)
        monkeypatch.setattr(torch_source, "ctypes", None)  # by which memory is read
        with TorchSource(str(path)) as source:
            found = [bytes(next(source.pieces(entry, entry.boxes[0]))) for entry in source.entries]
        assert found == [torch.arange(1000.0).numpy().tobytes(), torch.arange(3, 10).numpy().tobytes()]

    def test_a_file_of_an_old_torch_is_loaded_whole(self, tmp_path):
        state = {"w": torch.arange(5), "n": {"step": 3}}
        torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
        torch_save_to_dcp(tmp_path / "old.pt", tmp_path / "dcp")
        assert_same(load_stock(tmp_path / "dcp"), state)

    def test_views_are_put_in_order(self, tmp_path):
        torch.save({"t": torch.arange(6.0).reshape(2, 3).t(), "c": torch.tensor([1 + 2j]).conj()}, tmp_path / "a.pt")
        with TorchSource(str(tmp_path / "a.pt")) as source:
            found = [bytes(next(source.pieces(entry, entry.boxes[0]))) for entry in source.entries]
        assert found[0] == torch.tensor([0.0, 3, 1, 4, 2, 5]).numpy().tobytes()
        assert found[1] == torch.tensor([1 - 2j]).numpy().tobytes()

    @pytest.mark.parametrize(
        ("value", "reason"),
        [
            (torch.ones(3), "it holds a Tensor, not a state dict"),
            ([1], "it holds a list, not a state dict"),
        ],
    )
    def test_what_is_no_state_dict_is_refused(self, tmp_path, value, reason):
        torch.save(value, tmp_path / "a.pt")
        with pytest.raises(BadFile, match=reason):
            TorchSource(str(tmp_path / "a.pt"))

    @pytest.mark.parametrize(
        ("state", "reason"),
        [
            ({"s": torch.eye(2).to_sparse()}, "s, a Tensor \\(torch.sparse_coo"),
            ({"m": torch.empty(2, device="meta")}, "m, a Tensor"),
            ({"a.b": 1, "a": {"b": 2}}, "duplicate"),
        ],
    )
    def test_what_a_checkpoint_cannot_hold_is_named(self, tmp_path, state, reason):
        torch.save(state, tmp_path / "a.pt")
        with pytest.raises(Unsupported, match=reason):
            TorchSource(str(tmp_path / "a.pt"), trust=True)

    def test_it_is_not_there(self, tmp_path):
        with pytest.raises(SystemCallFailed, match="No such file"):
            TorchSource(str(tmp_path / "a.pt"))

    @pytest.mark.parametrize("keep", [0, 4, 100, -10])
    def test_a_cut_file_is_one_line(self, tmp_path, keep):
        torch.save({"w": torch.arange(100.0)}, tmp_path / "a.pt")
        data = (tmp_path / "a.pt").read_bytes()
        (tmp_path / "a.pt").write_bytes(data[:keep])
        with pytest.raises(BadFile) as caught:
            TorchSource(str(tmp_path / "a.pt"))
        assert "\n" not in str(caught.value)


class Evil:
    def __init__(self, mark: pathlib.Path) -> None:
        self._mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self._mark),)


class TestTrust:
    def test_a_file_that_names_classes_is_refused_and_not_run(self, tmp_path):
        torch.save({"x": Evil(tmp_path / "ran")}, tmp_path / "a.pt")
        with pytest.raises(BadFile, match="--trust") as caught:
            TorchSource(str(tmp_path / "a.pt"))
        assert "mkdir" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "ran").exists()

    def test_so_is_an_object_of_a_checkpoint(self, tmp_path):
        save_stock({"w": torch.ones(2), "x": Evil(tmp_path / "ran")}, tmp_path / "stock")
        with open_source(str(tmp_path / "stock")) as source:
            with pytest.raises(BadFile, match="x: its pickle names classes"):
                convert(source, str(tmp_path / "a.pt"), Format.TORCH)
            assert not (tmp_path / "a.pt").exists()
            assert not (tmp_path / "ran").exists()
            convert(source, str(tmp_path / "dcp"), Format.DCP)  # copies the pickle and does not run it
        assert not (tmp_path / "ran").exists()

    def test_trust_runs_it(self, tmp_path):
        save_stock({"w": torch.ones(2), "x": pathlib.PurePosixPath("/a")}, tmp_path / "stock")
        with open_source(str(tmp_path / "stock")) as source:
            convert(source, str(tmp_path / "a.pt"), Format.TORCH, wish=Wish(trust=True))
        assert torch.load(tmp_path / "a.pt", weights_only=False)["x"] == pathlib.PurePosixPath("/a")


def test_a_failure_leaves_what_was_there(saved, tmp_path):
    target = tmp_path / "a.pt"
    target.write_bytes(b"old")
    with open_source(str(saved / "stock")) as source, pytest.raises(OutputExists):
        convert(source, str(target), Format.TORCH, wish=Wish(trust=True))

    def fail(nbytes):
        raise KeyboardInterrupt

    with open_source(str(saved / "stock")) as source, pytest.raises(KeyboardInterrupt):
        convert(source, str(target), Format.TORCH, wish=Wish(trust=True, overwrite=True), done=fail)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
    assert target.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("paths", "wanted"),
    [
        ([("a",), ("b", "c")], {"a": 0, "b": {"c": 1}}),
        ([("a", 1), ("a", 0, "x")], {"a": [{"x": 1}, 0]}),
        ([("a", 2)], {"a": [None, None, 0]}),
    ],
)
def test_paths_make_a_nested_state(paths, wanted):
    state = {}
    for number, path in enumerate(paths):
        set_path(state, path, number)
    assert state == wanted


@pytest.mark.parametrize("paths", [[("a",), ("a", "b")], [("a", 0), ("a", "b")], [("a", "b"), ("a", 0)]])
def test_paths_that_contradict_each_other_are_refused(paths):
    state = {}
    set_path(state, paths[0], collections.OrderedDict())
    with pytest.raises(Unsupported, match="contradict"):
        set_path(state, paths[1], 1)
