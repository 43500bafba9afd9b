"""Any split of any tensors into chunks, written with any options, is read back in any other split, bit for bit."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed.checkpoint as stock
from hypothesis import given, settings
from hypothesis import strategies as st
from support.backends import play_ranks, read_parts, sharded
from torch.distributed.checkpoint.filesystem import SerializationFormat

from ckptd.checkpoint.storage.filesystem import FileSystemReader, FileSystemWriter
from ckptd.checkpoint.storage.objects import FsspecReader, FsspecWriter
from ckptd.checkpoint.storage.read_tasks import _run
from ckptd.checkpoint.verify import verify_checkpoint

DTYPES = [torch.float32, torch.int64, torch.bfloat16, torch.uint8, torch.bool]


@st.composite
def cuts(draw, shape):
    """Boxes that tile a shape: each axis cut at a few places."""
    boxes = [((), ())]
    for size in shape:
        places = sorted(draw(st.sets(st.integers(1, max(size - 1, 1)), max_size=2)) & set(range(1, size)))
        edges = [0, *places, size]
        steps = list(pairwise(edges))
        boxes = [((*o, a), (*s, b - a)) for o, s in boxes for a, b in steps]
    return boxes


@st.composite
def cases(draw):
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    elements = torch.arange(torch.Size(shape).numel()).reshape(shape)
    whole = (elements % 2).to(dtype) if dtype is torch.bool else elements.to(dtype)
    return whole, draw(cuts(shape)), draw(cuts(shape))


writer_options = st.fixed_dictionaries(
    {
        "thread_count": st.integers(1, 3),
        "single_file_per_rank": st.booleans(),
        "sync_files": st.just(False),
        "per_thread_copy_ahead": st.sampled_from([0, 100]),
    }
)


def assert_loaded(whole, boxes, reader):
    target = sharded(torch.zeros_like(whole), boxes)
    read_parts({"w": target}, reader)
    for shard, (offsets, sizes) in zip(target._shards, boxes, strict=True):
        place = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
        assert torch.equal(shard, whole[place])


@settings(max_examples=40, deadline=None)
@given(case=cases(), options=writer_options, ranks=st.integers(1, 3), as_safetensors=st.booleans())
def test_a_directory_gives_back_what_it_was_given(case, options, ranks, as_safetensors):
    whole, saved, wanted = case
    kind = SerializationFormat.SAFETENSORS if as_safetensors else SerializationFormat.TORCH_SAVE
    states = [{"w": sharded(whole, saved[rank::ranks])} for rank in range(ranks)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "ckpt")
        play_ranks(states, FileSystemWriter(path, serialization_format=kind, **options))
        assert_loaded(whole, wanted, FileSystemReader(path))
        assert verify_checkpoint(str(path)).good
        if not as_safetensors:
            assert_loaded(whole, wanted, stock.FileSystemReader(path))


@settings(max_examples=25, deadline=None)
@given(case=cases(), options=writer_options, compressed=st.booleans())
def test_a_store_gives_back_what_it_was_given(case, options, compressed):
    whole, saved, wanted = case
    with tempfile.TemporaryDirectory() as folder:
        url = f"memory:/{folder}//ckpt"
        extensions = ["stream.zstd"] if compressed else None
        play_ranks([{"w": sharded(whole, saved)}], FsspecWriter(url, _extensions=extensions, **options))
        assert_loaded(whole, wanted, FsspecReader(url))


@given(st.data())
def test_a_run_is_what_lies_one_behind_the_other(data):
    sizes = tuple(data.draw(st.lists(st.integers(1, 5), max_size=4)))
    offsets = tuple(data.draw(st.integers(0, size - 1)) for size in sizes)
    lengths = tuple(data.draw(st.integers(1, size - at)) for at, size in zip(offsets, sizes, strict=True))
    whole = torch.arange(torch.Size(sizes).numel()).reshape(sizes)
    box = whole[tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))].reshape(-1)
    run = _run(offsets, lengths, sizes)
    consecutive = torch.equal(box, torch.arange(len(box)) + box[0])
    assert (run is not None) == consecutive
    if run is not None:
        assert run == (int(box[0]), len(box))
