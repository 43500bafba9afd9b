"""Stream extensions: compressed by ours and read by stock, and the other way round."""

from __future__ import annotations

import io
import os

import pytest
import torch
import torch.distributed.checkpoint as stock
from support.backends import blank_state, load, loaded, same, save, small_state
from torch.distributed.checkpoint._extension import ExtensionRegistry as StockRegistry
from torch.distributed.checkpoint._extension import ZStandard as StockZStandard

from ckptd.checkpoint.storage.extensions import (
    ExtensionRegistry,
    StreamTransformExtension,
    ZStandard,
    resolve_extensions,
)
from ckptd.checkpoint.storage.filesystem import FileSystemReader, FileSystemWriter
from ckptd.protocol.errors import UnknownExtension, Unsupported, WrongBits


class Swapped(StreamTransformExtension):
    """Turns every bit over; stands for a user's own encryption."""

    @staticmethod
    def registry_name():
        return "swapped@tests"

    @staticmethod
    def from_descriptor(version):
        assert version == "2"
        return Swapped()

    def get_descriptor(self):
        return "swapped@tests/2"

    def transform_to(self, output):
        class Writer(io.RawIOBase):
            def writable(self):
                return True

            def write(self, data):
                output.write(bytes(byte ^ 0xFF for byte in memoryview(data).cast("B")))
                return len(memoryview(data).cast("B"))

            def close(self):
                output.close()

        return Writer()

    def transform_from(self, input):
        return io.BytesIO(bytes(byte ^ 0xFF for byte in input.read()))


def registries():
    """A registry of ours and one of stock's that know the user's extension."""
    ours, theirs = ExtensionRegistry(), StockRegistry()
    ours.register(Swapped)
    theirs.register(Swapped)
    return ours, theirs


COMBINATIONS = {
    "zstd": ([ZStandard()], [StockZStandard()]),
    "own": ([Swapped()], [Swapped()]),
    "both": ([Swapped(), ZStandard()], [Swapped(), StockZStandard()]),
}
combinations = pytest.mark.parametrize("combination", COMBINATIONS)


def small(number=1.0):
    return {"w": torch.arange(40.0).reshape(8, 5) * number, "step": int(number)}


def blank_small():
    return {"w": torch.zeros(8, 5), "step": 0}


@combinations
@pytest.mark.parametrize("threads", [1, 2])
class TestBothWays:
    def test_stock_reads_ours(self, combination, threads, tmp_path):
        ours, _ = COMBINATIONS[combination]
        save(small(), FileSystemWriter(tmp_path / "ckpt", _extensions=ours, thread_count=threads))
        found = load(blank_small(), stock.FileSystemReader(tmp_path / "ckpt", registries()[1]))
        assert torch.equal(found["w"], small()["w"])

    def test_ours_reads_stock(self, combination, threads, tmp_path):
        _, theirs = COMBINATIONS[combination]
        save(small(), stock.FileSystemWriter(tmp_path / "ckpt", _extensions=theirs, thread_count=threads))
        found = load(blank_small(), FileSystemReader(tmp_path / "ckpt", registries()[0]))
        assert torch.equal(found["w"], small()["w"])

    def test_descriptors_are_the_same(self, combination, threads, tmp_path):
        ours, theirs = COMBINATIONS[combination]
        one = save(small(), FileSystemWriter(tmp_path / "a", _extensions=ours, thread_count=threads))
        other = save(small(), stock.FileSystemWriter(tmp_path / "b", _extensions=theirs, thread_count=threads))
        descriptors = {key: place.transform_descriptors for key, place in one.storage_data.items()}
        assert descriptors == {key: place.transform_descriptors for key, place in other.storage_data.items()}


def test_it_does_compress(tmp_path):
    state = {"w": torch.zeros(20000)}
    save(state, FileSystemWriter(tmp_path / "ckpt", _extensions=[ZStandard(level=5)]))
    assert os.path.getsize(tmp_path / "ckpt" / "__0_0.distcp") < 2000


def test_extensions_can_be_given_by_name(tmp_path):
    save(small_state(), FileSystemWriter(tmp_path / "ckpt", _extensions=["stream.zstd"]))
    assert same(loaded(stock.FileSystemReader(tmp_path / "ckpt")), small_state())
    assert [type(each) for each in resolve_extensions(["stream.zstd/1"])] == [ZStandard]


def test_no_index_says_what_it_cannot(tmp_path):
    save(small_state(), FileSystemWriter(tmp_path / "ckpt"))
    save(small_state(2.0), FileSystemWriter(tmp_path / "ckpt", _extensions=[ZStandard()]))
    assert sorted(os.listdir(tmp_path / "ckpt")) == [".metadata", "__0_0.distcp"]
    assert same(loaded(FileSystemReader(tmp_path / "ckpt")), small_state(2.0))


def test_a_wrong_bit_in_a_compressed_file_is_found(tmp_path):
    metadata = save(small(), FileSystemWriter(tmp_path / "ckpt", _extensions=[ZStandard()]))
    places = sorted((place.offset, place.length) for place in metadata.storage_data.values())
    file = tmp_path / "ckpt" / "__0_0.distcp"
    good = file.read_bytes()
    offset, length = places[-1]
    for at in (offset, offset + length // 2, offset + length - 1):
        file.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
        with pytest.raises(BaseException, match="does not match its hash"):
            load(blank_small(), FileSystemReader(tmp_path / "ckpt"))


def test_an_extension_that_nobody_knows_is_named(tmp_path):
    save(small(), FileSystemWriter(tmp_path / "ckpt", _extensions=[Swapped()]))
    for reader in (FileSystemReader, stock.FileSystemReader):
        with pytest.raises(BaseException, match="swapped@tests"):
            load(blank_small(), reader(tmp_path / "ckpt"))


class TestRegistry:
    def test_is_usable_as_stocks(self, tmp_path):
        save(small_state(), stock.FileSystemWriter(tmp_path / "ckpt", _extensions=[StockZStandard()]))
        assert same(loaded(stock.FileSystemReader(tmp_path / "ckpt", ExtensionRegistry())), small_state())

    def test_stocks_is_usable_as_ours(self, tmp_path):
        save(small_state(), FileSystemWriter(tmp_path / "ckpt", _extensions=[ZStandard()]))
        assert same(loaded(FileSystemReader(tmp_path / "ckpt", StockRegistry())), small_state())

    def test_takes_a_class_under_a_name_of_ones_own(self):
        registry = ExtensionRegistry()
        registry.register(ZStandard, name="zip@old")
        [found] = registry.from_descriptor_list(["zip@old/1"])
        assert type(found) is ZStandard

    def test_an_unknown_name_is_a_value_error_as_stocks_is(self):
        for registry in (ExtensionRegistry(), StockRegistry()):
            with pytest.raises(ValueError, match="nothing"):
                registry.from_descriptor_list(["nothing/1"])

    def test_an_unknown_version_is_refused_by_both(self):
        for kind in (ZStandard, StockZStandard):
            with pytest.raises(ValueError, match="2"):
                kind.from_descriptor("2.0")
        assert isinstance(ZStandard.from_descriptor("1.7"), ZStandard)

    def test_what_transforms_no_stream_is_refused(self):
        with pytest.raises(Unsupported, match="StreamTransformExtension"):
            resolve_extensions([object()])
        with pytest.raises(UnknownExtension):
            resolve_extensions(["gzip"])

    def test_a_level_that_zstd_does_not_have_is_refused(self):
        with pytest.raises(Unsupported, match="level 99"):
            ZStandard(level=99)


def test_nothing_damaged_is_handed_on(tmp_path):
    metadata = save({"w": torch.ones(64)}, FileSystemWriter(tmp_path / "ckpt", _extensions=["stream.zstd"]))
    [place] = metadata.storage_data.values()
    file = tmp_path / "ckpt" / place.relative_path
    file.write_bytes(file.read_bytes()[: place.length - 8] + bytes(8))
    reader, planner, target = FileSystemReader(tmp_path / "ckpt"), stock.DefaultLoadPlanner(), {"w": torch.zeros(64)}
    found = reader.read_metadata()
    planner.set_up_planner(target, found, True)
    reader.set_up_storage_reader(found, True)
    with pytest.raises(WrongBits, match="'w'"):
        reader.read_data(planner.create_local_plan(), planner)
    assert target["w"].sum() == 0
    assert blank_state()["step"] == -1
