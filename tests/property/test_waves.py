"""An image that is staged in waves is, byte by byte and hash by hash, the one that is staged at once."""

from __future__ import annotations

import mmap
import tempfile
from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.plans import Held, local_plan

from ckptd.checkpoint.image.hashes import ImageHashes
from ckptd.checkpoint.image.layout import make_layout
from ckptd.checkpoint.image.write import Pace, Payloads, write_image
from ckptd.checkpoint.image.write_wave import Place, finish_waves, frame_of_file, write_wave
from ckptd.client.saving.layout import make_rank_layout
from ckptd.protocol.waves import cut
from ckptd.staging.copy import Copier
from ckptd.staging.views import DressedSlot
from ckptd.staging.waves import WaveFiller, pieces

PAGE = 4096
sizes = st.sampled_from([0, 1, 2, 3, 5, 17, 64, 700, 1024, 1025, 5000])
# float32, complex128 and bytes cover elements of 4, 16 and 1 bytes; the rest of the dtypes has no other sizes.
tensors = st.builds(
    Held,
    st.lists(sizes, min_size=0, max_size=2).map(tuple),
    dtype=st.sampled_from(["uint8", "float32", "complex128", "bfloat16"]),
)
held = st.lists(tensors | st.integers(1, 9000), max_size=10)


def source_of(thing, seed, *, transposed):
    """Return a tensor with every bit pattern in it, contiguous or not, or an object's bytes."""
    generator = np.random.default_rng(seed)
    if isinstance(thing, int):
        return generator.integers(0, 256, generator.integers(0, thing + 1), np.uint8).tobytes()
    dtype = getattr(torch, thing.dtype)
    shape = thing.shape[::-1] if transposed else thing.shape
    nbytes = int(np.prod(shape)) * dtype.itemsize
    tensor = torch.empty(nbytes, dtype=torch.uint8)
    tensor.numpy()[:] = generator.integers(0, 256, nbytes, np.uint8)
    tensor = tensor.view(dtype).view(shape)
    return tensor.t() if transposed and len(shape) == 2 else tensor.view(thing.shape)


def stage_at_once(layout, sources):
    memory = mmap.mmap(-1, layout.image_bytes or PAGE)
    memory[:] = b"\xee" * len(memory)
    dressed = DressedSlot(memory, 0, layout.image_bytes, layout.placed)
    pairs = []
    for position, (source, target) in enumerate(zip(sources, dressed.targets, strict=True)):
        if isinstance(source, bytes):
            dressed.put_object(position, source)
        else:
            pairs.append((target, source))
    Copier(threads=1).copy(pairs)
    return memoryview(memory)[: layout.image_bytes]


@settings(max_examples=40, deadline=None)
@given(held, st.integers(1, 12), st.integers(1, 3), st.booleans(), st.integers(0, 1 << 16))
def test_the_file_and_its_hashes_are_the_same(things, wave_pages, chunk_pages, transposed, seed):
    plan = local_plan({f"n{number}": thing for number, thing in enumerate(things)})
    layout = make_rank_layout(("s",), "digest", plan, np.arange(plan.items, dtype="<i8").tobytes())
    sources = [source_of(thing, seed + n, transposed=transposed) for n, thing in enumerate(things)]
    places = make_layout(plan, np.arange(plan.items))
    lengths = [len(s) if isinstance(s, bytes) else int(n) for s, n in zip(sources, places.data_bytes, strict=True)]
    items = Payloads(places.data_offset, np.array(lengths, np.int64), np.ones(len(things), np.bool_))
    pace = Pace(2, chunk_pages * PAGE)
    at_once = stage_at_once(layout, sources)
    hashes, filler, slot = ImageHashes(places.data_offset.tolist(), lengths), WaveFiller(layout.placed, sources), None
    with tempfile.TemporaryDirectory() as folder:
        whole, waves = Path(folder, "whole"), Path(folder, "waves")
        written = write_image(str(whole), at_once, items, pace=pace, on_progress=lambda _: None)
        slot = mmap.mmap(-1, (wave_pages + 1) * PAGE)
        for begin, end in cut(layout.image_bytes, wave_pages * PAGE):
            slot[:] = b"\xdd" * len(slot)  # what the wave before has left there
            Copier(threads=1).copy(filler.fill(slot, PAGE, begin, end))
            wave = memoryview(slot)[PAGE : PAGE + end - begin]
            hashes.update(wave)
            place = Place(begin, layout.image_bytes, begin == 0)
            write_wave(str(waves), wave, place, pace=pace, on_progress=lambda _: None)
            assert set(slot[:PAGE] + slot[PAGE + end - begin :]) <= {0xDD}
        if layout.image_bytes:
            finish_waves(str(waves), layout.image_bytes)
            assert waves.read_bytes() == whole.read_bytes()
            assert frame_of_file(str(waves), items, layout.image_bytes) == written.frame_hash
    assert hashes.items.tolist() == written.hashes.tolist()
    assert hashes.frame == written.frame_hash


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_any_range_of_any_view_is_cut_into_its_elements_in_order(shape, data):
    base = torch.arange(int(np.prod(shape)) * 2).reshape([*shape, 2])
    order = data.draw(st.permutations(range(len(shape))))
    view = base[..., data.draw(st.integers(0, 1))].permute(*order)
    if data.draw(st.booleans()):
        view = view[::2]
    begin = data.draw(st.integers(0, view.numel() - 1))
    end = data.draw(st.integers(begin + 1, view.numel()))
    found = list(pieces(view, begin, end))
    at = begin
    for element, part in found:
        assert element == at
        assert part.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()  # a view: nothing was copied
        at += part.numel()
    assert at == end
    assert torch.cat([part.reshape(-1) for _, part in found]).tolist() == view.reshape(-1)[begin:end].tolist()
    assert len(found) <= 2 * view.dim() + 1
