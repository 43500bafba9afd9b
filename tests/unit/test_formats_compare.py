"""What differs between checkpoints: names, types, values; by hash where that proves it, by bytes otherwise."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from support.stock import save_stock

from ckptd.checkpoint.formats.checkpoint import CheckpointSource
from ckptd.checkpoint.formats.compare import Difference, Kind, compare
from ckptd.checkpoint.formats.convert import Format, convert, open_source

STATE = {
    "w": torch.arange(12.0).reshape(4, 3),
    "b": torch.tensor([1.0, float("nan")], dtype=torch.bfloat16),
    "packed": torch.tensor([1, 2], dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    "step": 7,
    "groups": [{"lr": 0.1}],
}


@pytest.fixture
def make(tmp_path):
    def make(name, state=STATE, *, ours=False, **options):
        path = tmp_path / name
        save_stock(state, path, **options)
        if ours:
            with open_source(str(path)) as source:
                convert(source, f"{path}.0", Format.DCP)
            path = f"{path}.0"
        return str(path)

    return make


def differences(left, right, **options):
    with open_source(left) as one, open_source(right) as other:
        return list(compare(one, other, **options))


def changed(**values):
    return {**STATE, **values}


@pytest.mark.parametrize("ours", [(False, False), (True, False), (False, True), (True, True)])
def test_the_same_content_in_other_chunks_and_formats_is_the_same(make, ours):
    left = make("a", ours=ours[0])
    right = make("b", boxes={"w": [((0, 0), (4, 1)), ((0, 1), (4, 2))]}, ours=ours[1])
    assert differences(left, right) == []


def test_other_formats_are_compared_too(make, tmp_path):
    tensors = {name: STATE[name] for name in ("w", "b")}
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "a.pt")
    assert differences(make("a", tensors), str(tmp_path / "a.safetensors")) == []
    assert differences(str(tmp_path / "a.pt"), str(tmp_path / "a.safetensors")) == []


@pytest.mark.parametrize("ours", [False, True])
def test_each_kind_of_difference(make, ours):
    w = STATE["w"].clone()
    w[1, 2], w[3, 0] = 7.5, float("nan")
    packed = torch.tensor([1, 3], dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    right = changed(w=w, b=torch.ones(2), packed=packed, step=8, new=torch.ones(1))
    del right["groups"]
    found = differences(make("a", ours=ours), make("b", right, ours=ours))
    assert found == [
        Difference("w", Kind.VALUE, "float32[4, 3]", "float32[4, 3]", 2, 2.5),
        Difference("b", Kind.TYPE, "bfloat16[2]", "float32[2]"),
        Difference("packed", Kind.VALUE, "float4_e2m1fn_x2[2]", "float4_e2m1fn_x2[2]", 1, None),
        Difference("step", Kind.VALUE, "7", "8"),
        Difference("groups.0.lr", Kind.ONLY_LEFT, "object"),
        Difference("new", Kind.ONLY_RIGHT, right="float32[1]"),
    ]


def test_values_are_not_looked_at_if_not_asked(make):
    left, right = make("a"), make("b", changed(w=STATE["w"] + 1, step=9))
    assert differences(left, right, values=False) == []


def test_equal_hashes_spare_the_reading(make, monkeypatch):
    left, right = make("a", ours=True), make("b", ours=True)

    def read(*_):
        raise AssertionError("read")

    monkeypatch.setattr(CheckpointSource, "fill", read)
    monkeypatch.setattr(CheckpointSource, "object_bytes", read)
    assert differences(left, right) == []
    with pytest.raises(AssertionError, match="read"):
        differences(left, make("c"))


def test_progress_counts_every_byte(make):
    done = []
    differences(make("a"), make("b"), done=done.append)
    assert sum(done) == 48 + 4 + 2
