"""Stock's records of one tensor: values are found in every form that torch.save gives them, and no pickle is run."""

from __future__ import annotations

import ctypes
import io
import os
import pickle
import pickletools
import zipfile

import pytest
import torch
from support.states import bits, of_every_dtype

from ckptd.checkpoint.formats.record import Window, tensor_in_record
from ckptd.protocol.errors import BadIndex, TruncatedFile, Unsupported
from ckptd.staging.dtypes import by_name

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support")
BEFORE = 100
SHAPES = {
    "scalar": torch.tensor(3.5),
    "none": torch.empty(0, 3),
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
    "inner": torch.arange(600.0)[50:60],
    "channels_last": torch.arange(24.0).reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
    "parameter": torch.nn.Parameter(torch.ones(2, 3)),
    "large": torch.arange(100_000),
}


@pytest.fixture
def find(tmp_path):
    """Put a record into the middle of a file; return what is found there, and the file's bytes."""
    descriptors = []

    def find(record, *, nbytes=None):
        path = tmp_path / "file"
        path.write_bytes(b"\xee" * BEFORE + record + b"\xee" * 50)
        descriptors.append(os.open(path, os.O_RDONLY))
        nbytes = len(record) if nbytes is None else nbytes
        return tensor_in_record(descriptors[-1], str(path), BEFORE, nbytes), path.read_bytes()

    yield find
    for descriptor in descriptors:
        os.close(descriptor)


def record_of(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def archive(members, *, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as made:
        for name, data in members.items():
            made.writestr(f"archive/{name}", data)
    return file.getvalue()


@pytest.mark.parametrize("name", [*SHAPES, *of_every_dtype()])
def test_values_are_where_it_says(find, name):
    tensor = SHAPES.get(name)
    tensor = of_every_dtype()[name] if tensor is None else tensor
    found, file = find(record_of(tensor))
    assert (found.dtype, found.shape) == (by_name(str(tensor.dtype).removeprefix("torch.")).code, tuple(tensor.shape))
    assert found.strides == tensor.stride()
    assert found.is_contiguous == tensor.is_contiguous()
    if found.is_contiguous:
        values = bits(tensor).numpy().tobytes()
        assert file[found.data_offset : found.data_offset + len(values)] == values
    begin, nbytes = found.storage
    storage = tensor.detach().untyped_storage()
    assert file[begin : begin + nbytes] == (ctypes.string_at(storage.data_ptr(), nbytes) if nbytes else b"")
    assert nbytes == storage.nbytes()


@pytest.mark.parametrize("view", [lambda t: t.conj(), lambda t: t.conj().imag])
def test_a_view_that_is_not_resolved_is_left_to_torch(find, view):
    with pytest.raises(Unsupported, match="conjugate"):
        find(record_of(view(torch.tensor([1 + 2j]))))


def test_big_endian_is_left_to_torch(find):
    with pytest.raises(Unsupported, match="big-endian"):
        find(archive({"data.pkl": b"", "byteorder": b"big"}))


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/should-not-be",)


def fits(pickled: bytes) -> bytes:
    return archive({"data.pkl": pickled, "data/0": bytes(8), "byteorder": b"little"})


HONEST = zipfile.ZipFile(io.BytesIO(record_of(torch.ones(2)))).read("archive/data.pkl")
BAD = {
    "no archive": b"x" * 200,
    "nothing": b"",
    "no pickle": archive({"other": b""}),
    "no storage": archive({"data.pkl": HONEST}),
    "a long pickle": fits(b"\x80\x02" + b"N0" * 100_000 + b"."),
    "no tensor": fits(pickle.dumps([1, 2], 2)),
    "a class": fits(pickle.dumps(Evil(), 2)),
    "a builtin": fits(b"\x80\x02c__builtin__\neval\nX\x04\0\0\x001+1)\x85R."),
    "a storage too small": archive({"data.pkl": HONEST, "data/0": bytes(7)}),
    "a negative size": fits(HONEST.replace(b"K\x02\x85", b"J\xff\xff\xff\xff\x85", 1)),
    "a compressed storage": archive({"data.pkl": HONEST, "data/0": bytes(8)}, compression=zipfile.ZIP_DEFLATED),
    "a memo of 64 GiB": fits(b"\x80\x02]r\xff\xff\xff\xff."),
    "a number of 2 GiB": fits(b"\x80\x02\x8b\xff\xff\xff\x7f."),
    "a text of 4 GiB": fits(b"\x80\x02X\xff\xff\xff\xff."),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_tensors_record_is_refused_in_one_line(find, name):
    with pytest.raises(BadIndex, match="the record at offset 100 cannot be read") as caught:
        find(BAD[name])
    assert "\n" not in str(caught.value)
    assert not os.path.exists("/tmp/should-not-be")


def test_a_forged_pickle_is_what_we_think_it_is():
    names = [argument for _, argument, _ in pickletools.genops(fits_pickle(BAD["a class"])) if argument]
    assert any("system" in str(name) for name in names)


def fits_pickle(data: bytes) -> bytes:
    return zipfile.ZipFile(io.BytesIO(data)).read("archive/data.pkl")


@pytest.mark.parametrize("lost", [1, 30, 300])
def test_a_cut_record_is_refused(find, lost):
    record = record_of(torch.ones(100))
    with pytest.raises(BadIndex):
        find(record[:-lost])


class TestWindow:
    def test_reads_its_range_and_no_more(self, tmp_path):
        (tmp_path / "a").write_bytes(b"0123456789")
        with open(tmp_path / "a", "rb") as file:
            window = Window(file.fileno(), "a", 2, 5)
            assert window.read() == b"23456"
            assert window.seek(-2, os.SEEK_END) == 3
            assert window.read(10) == b"56"
            assert window.read(1) == b""
            with pytest.raises(ValueError, match="before"):
                window.seek(-1)

    def test_a_file_that_ends_within_it(self, tmp_path):
        (tmp_path / "a").write_bytes(b"0123")
        with open(tmp_path / "a", "rb") as file, pytest.raises(TruncatedFile):
            Window(file.fileno(), "a", 2, 5).read(5)
