"""What `async_save` returns says truly how far the save is."""

import gc
import threading
import weakref
from concurrent.futures import Future

import pytest
import torch
from support.clients import assert_holds, stock_metadata
from support.nursery import state
from support.processes import stopped
from support.waiting import wait_until


class Held:
    """Holds the copy into the slot until it is let go."""

    def __init__(self, session, monkeypatch):
        self._copy = session._copier.copy
        self.begun, self._go = threading.Event(), threading.Event()
        monkeypatch.setattr(session._copier, "copy", self._held)

    def _held(self, pairs):
        self.begun.set()
        assert self._go.wait(20)
        self._copy(pairs)

    def let_go(self):
        self._go.set()


def test_a_future_goes_from_staged_to_committed(daemon, client, tmp_path):
    client.save(state(), checkpoint_id=tmp_path / "before")
    called = []
    with stopped(*daemon.workers()):
        future = client.async_save(state(), checkpoint_id=tmp_path / "a")
        future.add_done_callback(called.append)
        assert isinstance(future, Future)
        assert future.state == "staged"
        assert future.staging_completion.result(0) is None
        assert not future.done()
        assert not future.cancel()
        assert future.progress.bytes_done == 0 < future.progress.bytes_total
        assert not (tmp_path / "a").exists()
        with pytest.raises(TimeoutError):
            future.result(0.01)
    metadata = future.result(30)
    assert future.state == "committed"
    assert future.upload_completion.result(0) is metadata
    assert future.progress.bytes_done == future.progress.bytes_total >= 1 << 20
    assert called == [future]
    assert future.checkpoint_id == str(tmp_path / "a")
    assert 0 < future.stall_s < 20
    read = stock_metadata(tmp_path / "a")
    assert metadata.state_dict_metadata == read.state_dict_metadata
    assert metadata.planner_data == read.planner_data
    assert metadata.storage_data == read.storage_data


def test_a_failed_save_fails_both_of_its_futures(daemon, client, tmp_path):
    (tmp_path / "file").touch()
    future = client.async_save(state(), checkpoint_id=tmp_path / "file" / "a")
    assert future.exception(30) is not None
    assert future.state == "failed"
    assert future.staging_completion.exception(0) is None  # staged it was; the write failed
    with pytest.raises(RuntimeError, match="file"):
        future.result(0)
    unstaged = client.async_save({"w": torch.eye(2).to_sparse()}, checkpoint_id=tmp_path / "b")
    assert unstaged.exception(30) is not None
    assert unstaged.staging_completion.exception(5) is not None
    with pytest.raises(RuntimeError, match="sparse"):
        client.save({"w": torch.eye(2).to_sparse()}, checkpoint_id=tmp_path / "b")


def test_background_staging_returns_at_once_and_the_optimizer_waits(daemon, client, tmp_path, monkeypatch):
    session = client.connect(staging="background")
    weight = torch.nn.Parameter(torch.ones(1 << 18))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    hook = client.wait_for_staging(optimizer)
    held = Held(session, monkeypatch)
    future = client.async_save({"model": {"w": weight}}, checkpoint_id=tmp_path / "a")
    assert held.begun.wait(20)
    assert future.state == "scheduled"
    weight.grad = torch.ones_like(weight)
    stepped = threading.Thread(target=optimizer.step)
    stepped.start()
    assert not future.staging_completion.done()
    assert torch.equal(weight.detach(), torch.ones(1 << 18))
    held.let_go()
    stepped.join(20)
    assert future.staging_completion.done()
    assert weight.detach()[0] == 0.0
    future.result(30)
    found = {"model": {"w": torch.zeros(1 << 18)}}
    client.load(found, checkpoint_id=tmp_path / "a")
    assert torch.equal(found["model"]["w"], torch.ones(1 << 18))
    hook.remove()
    optimizer.step()


def test_an_async_stager_of_stock_asks_for_background_staging(daemon, client, tmp_path, monkeypatch):
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    session = client.connect()
    held = Held(session, monkeypatch)
    options = StagingOptions(
        use_pinned_memory=False, use_shared_memory=False, use_async_staging=True, use_non_blocking_copy=False
    )
    stager = DefaultStager(options)
    future = client.async_save(state(), checkpoint_id=tmp_path / "a", async_stager=stager)
    assert held.begun.wait(20)
    assert future.state == "scheduled"
    held.let_go()
    future.result(30)
    stager.close()


def test_what_is_staged_is_not_held(daemon, client, tmp_path):
    class Leaf:
        def __reduce__(self):
            return (int, ())

    held = {"w": torch.ones(1000), "leaf": Leaf()}
    client.save(held, checkpoint_id=tmp_path / "a")
    tensor, leaf = weakref.ref(held["w"]), weakref.ref(held["leaf"])
    with stopped(*daemon.workers()):
        future = client.async_save(held, checkpoint_id=tmp_path / "a")
        del held
        gc.collect()
        assert tensor() is None
        assert leaf() is None
    future.result(30)


def test_two_saves_in_flight_are_committed_in_their_order(daemon, client, tmp_path):
    client.save(state(), checkpoint_id=tmp_path / "a")
    order = []
    with stopped(*daemon.workers()):
        futures = [client.async_save(state(value=value), checkpoint_id=tmp_path / "a") for value in (2.0, 3.0)]
        for number, future in enumerate(futures):
            future.add_done_callback(lambda _, number=number: order.append(number))
    wait_until(lambda: all(future.done() for future in futures), "both commits")
    assert [future.state for future in futures] == ["committed", "committed"]
    assert order == [0, 1]
    assert_holds(tmp_path / "a", value=3.0)
