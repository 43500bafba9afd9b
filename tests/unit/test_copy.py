"""When a copy returns, every byte is in its place."""

from __future__ import annotations

import threading

import pytest
import torch
from support.streams import DEVICE, HeldStream

from ckptd.staging import copy as copy_module
from ckptd.staging.copy import Copier, CudaSideStream, _PlainDevice, make_side_stream
from ckptd.staging.dtypes import DTYPES

LARGE = copy_module._LARGE_BYTES

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def copier(request):
    copier = Copier(threads=request.param)
    yield copier
    copier.close()


@pytest.fixture
def stream(monkeypatch):
    stream = HeldStream()
    monkeypatch.setattr(copy_module, "make_side_stream", lambda device: stream)
    return stream


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def random_tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    nbytes = torch.empty((0,), dtype=dtype).itemsize * int(torch.tensor(shape).prod())
    top = 2 if dtype is torch.bool else 256
    return torch.randint(0, top, (nbytes,), dtype=torch.uint8).view(dtype).view(shape)


def copied(copier: Copier, *sources: torch.Tensor) -> list[torch.Tensor]:
    targets = [torch.empty(source.shape, dtype=source.dtype) for source in sources]
    copier.copy(list(zip(targets, sources, strict=True)))
    return targets


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_tensors_of_every_dtype_and_size_are_copied_bit_by_bit(copier, dtype):
    torch_dtype = getattr(torch, dtype.name)
    sources = [random_tensor(torch_dtype, *shape) for shape in [(8, 8), (1,), (3, 5, 7), (LARGE,), (LARGE + 3,)]]
    for source, target in zip(sources, copied(copier, *sources), strict=True):
        assert raw(target) == raw(source)


def test_many_small_tensors_and_some_large_ones_go_together(copier):
    sources = [torch.full((n,), float(n)) for n in (1, LARGE, 0, 5, LARGE // 4 - 1, LARGE // 4, 2 * LARGE)]
    for source, target in zip(sources, copied(copier, *sources), strict=True):
        assert torch.equal(source, target)


@pytest.mark.parametrize("size", [4, 600])
def test_tensors_that_are_not_contiguous_are_copied_by_value(copier, size):
    base = torch.randn(size, size)
    sources = [base.t(), base[:, ::2], base[1:, 1:], base.expand(2, size, size), base.flip(0).t()]
    for source, target in zip(sources, copied(copier, *sources), strict=True):
        assert torch.equal(source, target)


@pytest.mark.parametrize("size", [4, LARGE])
def test_conjugate_and_negative_views_are_copied_by_value(copier, size):
    base = torch.randn(size, dtype=torch.complex64)
    sources = [base.conj(), base.conj().imag, torch._neg_view(base.real.clone())]
    assert sources[0].is_conj()
    assert sources[1].is_neg()
    for source, target in zip(sources, copied(copier, *sources), strict=True):
        assert not target.is_conj()
        assert torch.equal(
            torch.view_as_real(source.resolve_conj()) if source.is_complex() else source.resolve_neg(),
            torch.view_as_real(target) if target.is_complex() else target,
        )


def test_empty_and_0d_tensors_are_copied(copier):
    targets = copied(copier, torch.empty(0), torch.tensor(7.5), torch.empty(3, 0, 2), torch.tensor(True))
    assert targets[1].item() == 7.5
    assert targets[3].item() is True


def test_nothing_is_nothing(copier):
    copier.copy([])


def test_a_source_that_needs_a_gradient_gets_none(copier):
    sources = [torch.ones(4, requires_grad=True), torch.ones(2, 3, requires_grad=True).t()]
    for target in copied(copier, *sources):
        assert not target.requires_grad
        assert (target == 1).all()


@pytest.mark.parametrize("beyond", [-1, 0, 1, 12_345])
def test_long_tensors_are_shared_out_in_parts(copier, monkeypatch, beyond):
    monkeypatch.setattr(copy_module, "_PART_BYTES", 300_000)
    sources = [random_tensor(torch.uint8, size + beyond) for size in (900_000, copy_module._SHARED_BYTES, LARGE, 7)]
    for source, target in zip(sources, copied(copier, *sources), strict=True):
        assert raw(target) == raw(source)


def test_a_copy_returns_when_all_threads_are_done_and_waits_for_none_that_has_not_begun(monkeypatch):
    copier, release, begun = Copier(threads=2), threading.Event(), threading.Event()
    memmove, caller, held = copy_module.ctypes.memmove, threading.get_ident(), []

    def hold_the_helper(*block):
        if threading.get_ident() != caller:
            begun.set()
            assert release.wait(20)
            held.append(block)
        else:
            assert begun.wait(20)
        memmove(*block)

    monkeypatch.setattr(copy_module.ctypes, "memmove", hold_the_helper)
    sources = [random_tensor(torch.uint8, 1 << 20) for _ in range(4)]
    threading.Timer(0.05, release.set).start()
    for source, target in zip(sources, copied(copier, *sources), strict=True):
        assert raw(target) == raw(source)
    assert len(held) == 1
    release.clear()
    busy = copier._pool.submit(release.wait, 20)  # the only helper has something else to do
    for source, target in zip(sources, copied(copier, *sources), strict=True):
        assert raw(target) == raw(source)
    assert len(held) == 1
    release.set()
    assert busy.result(20)
    copier.close()


def test_threads_are_few_and_at_least_one(monkeypatch):
    for cores, threads in [(1, 1), (2, 2), (8, 2), (12, 3), (64, 4)]:
        monkeypatch.setattr(copy_module.os, "sched_getaffinity", lambda pid, cores=cores: set(range(cores)))
        copier = Copier()
        assert copier._threads == threads
        copier.close()


class TestTheSideStream:
    def test_copy_does_not_return_before_the_streams_work_is_done(self, copier, stream):
        targets = [torch.zeros(4), torch.zeros(2)]
        returned = threading.Event()

        def stage():
            copier.copy([(targets[0], torch.ones(4, device=DEVICE)), (targets[1], torch.ones(2))])
            returned.set()

        thread = threading.Thread(target=stage)
        thread.start()
        assert stream.waited_for.wait(10)
        assert not returned.is_set()
        assert targets[0].sum() == 0
        assert targets[1].sum() == 2  # what lies in host memory does not wait for the device
        stream.released.set()
        thread.join(10)
        assert returned.is_set()
        assert targets[0].sum() == 4

    def test_the_mark_comes_before_the_copies_and_on_the_same_stream(self, copier, stream):
        stream.released.set()
        copier.mark({DEVICE})
        copier.copy([(torch.zeros(4), torch.ones(4, device=DEVICE))])
        copier.mark({DEVICE})
        copier.copy([(torch.zeros(4), torch.ones(4, device=DEVICE))])
        assert stream.calls == ["mark", "copy", "wait"] * 2

    def test_all_copies_of_a_device_are_queued_at_once(self, copier, stream):
        stream.released.set()
        copier.copy([(torch.zeros(1), torch.ones(1, device=DEVICE)) for _ in range(5)])
        assert stream.calls == ["copy", "wait"]

    def test_a_copy_that_fails_leaves_nothing_under_way(self, copier, stream):
        stream.released.set()
        target = torch.zeros(4)
        with pytest.raises(RuntimeError):
            copier.copy([(target, torch.ones(4, device=DEVICE)), (torch.zeros(3), torch.ones(2, 2).t())])
        assert stream.calls[-1] == "wait"

    def test_a_job_without_a_device_marks_nothing(self, copier, stream):
        copier.mark(set())
        copier.copy([(torch.zeros(1), torch.ones(1))])
        assert stream.calls == []

    def test_other_devices_copy_at_once(self):
        stream = make_side_stream(torch.device("cpu"))
        assert isinstance(stream, _PlainDevice)
        target = torch.zeros(3)
        stream.mark()
        stream.copy([(target, torch.ones(3))])
        stream.wait()
        assert target.sum() == 3


@pytest.mark.cuda
@cuda
class TestCuda:
    def test_tensors_arrive_and_later_changes_do_not(self):
        device = torch.device("cuda")
        copier = Copier()
        source = torch.arange(1 << 20, device=device, dtype=torch.float32)
        target = torch.empty(1 << 20).pin_memory()
        torch.cuda._sleep(50_000_000)
        source += 1  # queued before the mark: part of the save
        copier.mark({source.device})
        copier.copy([(target, source)])
        source.zero_()
        assert torch.equal(target, torch.arange(1, (1 << 20) + 1, dtype=torch.float32))
        copier.close()

    def test_work_queued_after_the_mark_does_not_hold_the_copy_up(self):
        device = torch.device("cuda")
        copier = Copier()
        source = torch.ones(1024, device=device)
        target = torch.zeros(1024).pin_memory()
        copier.mark({source.device})
        torch.cuda._sleep(2_000_000_000)
        after = torch.cuda.Event()
        after.record()
        copier.copy([(target, source)])
        assert target.sum() == 1024
        assert not after.query()
        torch.cuda.synchronize()
        copier.close()

    def test_the_allocator_does_not_hand_out_a_source_that_is_being_copied(self):
        stream = CudaSideStream(torch.device("cuda"))
        source = torch.full((1 << 24,), 7.0, device="cuda")
        target = torch.empty(1 << 24).pin_memory()
        stream.mark()
        stream.copy([(target, source)])
        del source
        torch.zeros(1 << 24, device="cuda")
        stream.wait()
        assert (target == 7).all()

    def test_views_that_are_not_contiguous_arrive(self):
        copier = Copier()
        source = torch.randn(64, 32, device="cuda", dtype=torch.complex64)
        sources = [source.t(), source.conj(), source[::2, 1:]]
        targets = [torch.empty(s.shape, dtype=s.dtype) for s in sources]
        copier.mark({source.device})
        copier.copy(list(zip(targets, sources, strict=True)))
        assert all(torch.equal(t, s.cpu()) for t, s in zip(targets, sources, strict=True))
        copier.close()
