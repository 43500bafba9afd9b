"""Places of values in stock records: found where they are sure, left to torch where they are not."""

from __future__ import annotations

import io
import pickle
import random

import pytest
import torch
from support.clients import stock_load, stock_save
from torch.testing._internal.common_dtype import all_types_complex_float8_and

from ckptd.checkpoint.indexing.open import read_index
from ckptd.checkpoint.stock.metadata import dtype_code
from ckptd.client.loading import records as load_records
from ckptd.client.loading.load import load_into
from ckptd.client.loading.match import LoadRules
from ckptd.client.loading.records import place_in_record, with_places
from ckptd.staging.image import tensor_record

DTYPES = all_types_complex_float8_and(
    torch.bool, torch.float16, torch.bfloat16, torch.uint16, torch.uint32, torch.uint64
)


def record_of(value) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def place(record: bytes, like: torch.Tensor) -> int | None:
    head, tail = record[:2048], record[-2048:]
    return place_in_record(head, tail, len(record), dtype=dtype_code(like.dtype), sizes=tuple(like.shape))


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


class TestAPlace:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 1, 3, 1, 2)])
    def test_is_where_the_values_lie(self, dtype, shape):
        tensor = torch.arange(60).to(dtype)[: torch.Size(shape).numel()].clone().view(shape)
        record = record_of(tensor)
        begin = place(record, tensor)
        assert begin is not None
        assert record[begin : begin + tensor.nbytes] == bits(tensor)

    @pytest.mark.parametrize(
        "tensor",
        [
            torch.zeros(4, 6).t(),
            torch.arange(9.0)[3:],
            torch.arange(9.0)[:3],
            torch.zeros(3).expand(2, 3),
            torch.zeros(3, 3).to_sparse(),
            torch.zeros(3, dtype=torch.complex64).conj(),
        ],
        ids=["transposed", "begins later", "ends earlier", "expanded", "sparse", "conjugated"],
    )
    def test_is_not_told_of_a_view(self, tensor):
        assert place(record_of(tensor), tensor) is None

    @pytest.mark.parametrize("other", [torch.zeros(6), torch.zeros(2, 3), torch.zeros(3, 2, dtype=torch.int32)])
    def test_is_not_told_of_another_tensor(self, other):
        assert place(record_of(torch.zeros(3, 2)), other) is None

    def test_is_not_told_of_objects(self):
        assert place(record_of({"a": torch.zeros(3)}), torch.zeros(3)) is None
        assert place(record_of([1, 2, 3]), torch.zeros(3)) is None

    def test_is_not_told_of_bytes_in_another_order(self):
        record = record_of(torch.zeros(3))
        assert place(record.replace(b"little", b"big!!!"), torch.zeros(3)) is None

    def test_of_damaged_records_is_never_elsewhere(self):
        tensor = torch.arange(50)
        record = record_of(tensor)
        right = place(record, tensor)
        bytes_of = random.Random(0)
        for _ in range(300):
            damaged = bytearray(record)
            for _ in range(3):
                damaged[bytes_of.randrange(len(record))] = bytes_of.randrange(256)
            found = place(bytes(damaged), tensor)
            assert found is None or 0 <= found <= len(record) - tensor.nbytes
        assert right is not None

    @pytest.mark.parametrize("rows", [1, 1 << 30, 1 << 31, 1 << 34])
    def test_may_be_of_more_than_four_gigabytes(self, rows):
        code, sizes = dtype_code(torch.float32), (rows, 2)
        record = tensor_record(code, sizes)
        known = place_in_record(record.prefix, record.suffix, record.record_bytes, dtype=code, sizes=sizes)
        # Torch memoises what it pickles and we do not; both read the same.
        assert known == len(record.prefix)

    def test_executes_nothing(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return (open, (str(tmp_path / "made"), "w"))

        record = record_of(torch.zeros(3))
        pickled = pickle.dumps(Evil(), protocol=2)
        begin = record.index(b"\x80\x02ctorch")
        assert place(record[:begin] + pickled + record[begin + len(pickled) :], torch.zeros(3)) is None
        assert not (tmp_path / "made").exists()


class TestACheckpoint:
    @pytest.fixture
    def checkpoint(self, tmp_path):
        state = {"big": torch.arange(40_000.0).view(200, 200), "small": torch.arange(5), "text": "x" * 300_000}
        stock_save(state, tmp_path)
        return str(tmp_path), state

    @pytest.fixture(autouse=True)
    def shorter_records(self, monkeypatch):
        monkeypatch.setattr(load_records, "RECORD_BYTES_AT_LEAST", 100_000)

    def test_tells_places_of_large_tensors_only(self, checkpoint):
        path, _ = checkpoint
        index = read_index(path)
        known = with_places(path, index, range(len(index.names)))
        told = {index.names[row]: int(nbytes) for row, nbytes in zip(known.item_name, known.data_bytes, strict=True)}
        assert told["big"] == 160_000
        assert told["small"] == -1
        assert (index.data_bytes[index.item_name == index.names.index("big")] == -1).all()

    def test_asks_for_no_place_that_nobody_wants(self, checkpoint):
        path, _ = checkpoint
        index = read_index(path)
        assert with_places(path, index, [index.names.index("small")]) is index

    def test_loads_without_torch_reading_the_record(self, checkpoint, monkeypatch):
        path, saved = checkpoint
        monkeypatch.setattr("ckptd.client.loading.plan._load_record", None)
        found = {"big": torch.zeros(200, 200)}
        report = load_into(found, path, rules=LoadRules())
        assert torch.equal(found["big"], saved["big"])
        assert report.needed_bytes == 160_000

    def test_loads_what_only_torch_can_read(self, tmp_path):
        saved = {"view": torch.arange(80_000.0).view(200, 400).t()}
        stock_save(saved, tmp_path)
        ours, theirs = {"view": torch.zeros(400, 200)}, {"view": torch.zeros(400, 200)}
        load_into(ours, str(tmp_path), rules=LoadRules())
        stock_load(theirs, tmp_path)
        assert torch.equal(ours["view"], theirs["view"])
        assert torch.equal(ours["view"], saved["view"])

    def test_a_lost_file_is_told(self, checkpoint, tmp_path):
        path, _ = checkpoint
        (tmp_path / "__0_0.distcp").unlink()
        with pytest.raises(Exception, match=r"__0_0.distcp is missing"):
            load_into({"big": torch.zeros(200, 200)}, path, rules=LoadRules())
