"""A restarted trainer loads its job's last save from shared memory, and from nothing else that is like it."""

from __future__ import annotations

import shutil

import pytest
import torch
from support.clients import assert_holds
from support.memory import (
    ABSENT,
    LOAD,
    OVERWRITTEN,
    PATIENT,
    SERVED,
    SERVED_BYTES,
    VALUES,
    arenas,
    spoil,
    values,
)
from support.meshes import as_rank, dtensor
from support.waiting import wait_until
from torch.distributed.tensor import Shard

from ckptd.checkpoint.reading.images import ImageFile
from ckptd.client.loading import retained
from ckptd.client.session import sessions
from ckptd.protocol.errors import MissingKeys, WrongBits

ROWS, COLUMNS = 256, 96


@pytest.fixture
def daemon(start_daemon):
    """A daemon that keeps the last commits of ended jobs."""
    return start_daemon(retain_s=600.0)


@pytest.fixture
def patient(monkeypatch):
    """This process waits for a daemon that is slow, but not hung."""
    monkeypatch.setattr(retained, "ANSWER_WITHIN_S", 20.0)


def save_and_die(trainers, path, *, job="job", ranks=1):
    """A job saves, spoils nothing and is killed."""
    old = trainers.job(ranks, name=job)
    old.do("dcp.save(state(value=2.0), checkpoint_id=path)", path=str(path))
    for trainer in old:
        trainer.kill()


@pytest.mark.parametrize("job", [None, "job", "another job"])
def test_a_restarted_trainer_loads_from_memory(daemon, trainers, tmp_path, job):
    save_and_die(trainers, tmp_path / "a")
    spoil(tmp_path / "a")
    [new] = trainers.job(1, name=job) if job else [trainers.start()]
    new.do(LOAD, mib=1, path=str(tmp_path / "a"))
    assert new.get(VALUES) == values("memory", 2.0)
    assert new.get("report.needed_bytes <= report.read_bytes")
    assert (daemon.metric(SERVED), daemon.metric(SERVED_BYTES)) == (1, new.get("report.read_bytes"))
    retained_save = daemon.status()["jobs"][0]["retained"]
    assert (retained_save["checkpoint_id"], retained_save["bytes"] > 1 << 20) == (str(tmp_path / "a"), True)


def test_all_ranks_of_another_world_load_from_memory_each_for_itself(daemon, trainers, tmp_path):
    old = trainers.job(2, name="old")
    old.do(
        "dcp.save({'own': {f'r{rank}': torch.full((999,), rank + 1.0)}}, checkpoint_id=path)", path=str(tmp_path / "a")
    )
    for trainer in old:
        trainer.kill()
    spoil(tmp_path / "a")
    new = trainers.job(3, name="new")
    new.do(PATIENT + "found = {'own': {f'r{n}': torch.zeros(999) for n in range(2)}}")
    new.do("report = dcp.load(found, checkpoint_id=path)", path=str(tmp_path / "a"))
    assert new.get("report.source") == ["memory"] * 3
    assert new.get("[found['own'][f'r{n}'].unique().tolist() for n in range(2)]") == [[[1.0], [2.0]]] * 3
    assert daemon.metric(SERVED) == 3


@pytest.mark.parametrize("dimension", [0, 1])
def test_parts_of_tensors_come_from_memory_too(daemon, client, patient, tmp_path, dimension):
    whole = torch.arange(ROWS * COLUMNS, dtype=torch.float32).view(ROWS, COLUMNS)
    client.save({"w": whole}, checkpoint_id=tmp_path / "a")
    sessions.close_all()
    spoil(tmp_path / "a")
    for rank in range(3):
        with as_rank(rank, 3):
            part = whole.chunk(3, dimension)[rank]
            shard = dtensor(torch.zeros(part.shape), (ROWS, COLUMNS), [Shard(dimension)], (3,))
            report = client.load({"w": shard}, checkpoint_id=tmp_path / "a")
            assert torch.equal(shard.to_local(), part)
            assert report.source == "memory"


def test_what_is_let_pass_is_so_from_memory_too(daemon, client, patient, tmp_path):
    client.save({"w": torch.ones(3), "i": torch.arange(4), "t": "text"}, checkpoint_id=tmp_path / "a")
    spoil(tmp_path / "a")
    found = {"w": torch.zeros(3, dtype=torch.float64), "t": "", "no": torch.zeros(1)}
    with pytest.raises(MissingKeys):
        client.load(found, checkpoint_id=tmp_path / "a")
    report = client.load(found, checkpoint_id=tmp_path / "a", strict=False)
    assert (report.source, report.missing, report.unexpected) == ("memory", ("no",), ("i",))
    assert (found["w"].tolist(), found["t"]) == ([1.0] * 3, "text")


def test_the_job_itself_loads_its_last_save_from_memory_and_older_ones_from_the_disk(daemon, client, patient, tmp_path):
    for value in (1.0, 2.0):
        client.save({"w": torch.full((5,), value)}, checkpoint_id=tmp_path / f"{value}")
    found = {"w": torch.zeros(5)}
    for value, source in ((2.0, "memory"), (1.0, "disk"), (2.0, "memory")):
        assert client.load(found, checkpoint_id=tmp_path / f"{value}").source == source
        assert found["w"].tolist() == [value] * 5


def test_a_checkpoint_that_was_replaced_by_another_one_is_not_confused_with_it(daemon, trainers, tmp_path):
    [one, other] = trainers.job(1, name="one") + trainers.job(1, name="other")
    one.do("dcp.save(state(value=1.0), checkpoint_id=path)", path=str(tmp_path / "a"))
    for value in (2.0, 3.0):
        other.do("dcp.save(state(value=value), checkpoint_id=path)", value=value, path=str(tmp_path / f"{value}"))
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "2.0").rename(tmp_path / "a")
    one.do(LOAD, mib=1, path=str(tmp_path / "a"))
    assert one.get(VALUES) == values("disk", 2.0)
    assert daemon.metric(ABSENT) == 1
    # A checkpoint that was only moved is the same.
    (tmp_path / "3.0").rename(tmp_path / "moved")
    one.do(LOAD, mib=1, path=str(tmp_path / "moved"))
    assert one.get(VALUES) == values("memory", 3.0)


def test_a_slot_that_is_staged_over_while_it_is_read_is_not_believed(daemon, client, patient, tmp_path, monkeypatch):
    client.save({"w": torch.full((1 << 18,), 1.0)}, checkpoint_id=tmp_path / "1")
    pending = [2.0, 3.0]
    real = ImageFile.fill

    def save_on(self, begin, targets):
        while pending:
            value = pending.pop(0)
            client.save({"w": torch.full((1 << 18,), value)}, checkpoint_id=tmp_path / f"{value}")
        return real(self, begin, targets)

    monkeypatch.setattr(ImageFile, "fill", save_on)
    found = {"w": torch.zeros(1 << 18)}
    report = client.load(found, checkpoint_id=tmp_path / "1", verify=False)
    assert (report.source, found["w"].unique().tolist()) == ("disk", [1.0])
    assert (daemon.metric(OVERWRITTEN), daemon.metric(SERVED), daemon.metric(SERVED_BYTES)) == (1, 0, 0)


def test_a_slot_that_is_dressed_anew_holds_no_save_any_more(daemon, client, patient, tmp_path):
    state = {"w": torch.full((3000,), 1.0)}
    session = client.connect(state)
    client.save(state, checkpoint_id=tmp_path / "a")
    session.prepare({"w": torch.zeros(10), "v": torch.zeros(2000)})
    found = {"w": torch.zeros(3000)}
    assert client.load(found, checkpoint_id=tmp_path / "a").source == "disk"
    assert found["w"].unique().tolist() == [1.0]


def test_memory_is_kept_for_a_while_and_then_the_disk_is_read(start_daemon, trainers, tmp_path):
    daemon = start_daemon(retain_s=0.1)
    save_and_die(trainers, tmp_path / "a")
    wait_until(lambda: not arenas(daemon), "the end of the memory")
    trainer = trainers.start()
    trainer.do(LOAD, mib=1, path=str(tmp_path / "a"))
    assert trainer.get(VALUES) == values("disk", 2.0)
    assert daemon.metric(ABSENT) == 1


def test_memory_is_given_up_for_a_job_that_needs_it(mounts, start_daemon, trainers, tmp_path):
    start_daemon(retain_s=600.0, shm_dir=str(mounts.tmpfs(mib=16, name="shm")))
    old, new, reader = trainers.start(), trainers.start(), trainers.start()
    old.do("dcp.save(state(4, 2.0), checkpoint_id=path)", path=str(tmp_path / "a"))
    old.kill()
    reader.do(LOAD, mib=4, path=str(tmp_path / "a"))
    assert reader.get(VALUES) == values("memory", 2.0)
    new.do("dcp.save(state(4, 3.0), checkpoint_id=path)", path=str(tmp_path / "b"))
    for path, value, source in (("a", 2.0, "disk"), ("b", 3.0, "memory")):
        reader.do(LOAD, mib=4, path=str(tmp_path / path))
        assert reader.get(VALUES) == values(source, value)


def test_nobody_loads_from_memory_where_the_configuration_forbids_it(start_daemon, client, patient, tmp_path):
    start_daemon(retain_s=0.0)
    client.save({"w": torch.ones(5)}, checkpoint_id=tmp_path / "a")
    assert client.load({"w": torch.zeros(5)}, checkpoint_id=tmp_path / "a").source == "disk"
    spoil(tmp_path / "a")
    with pytest.raises(WrongBits):
        client.load({"w": torch.zeros(5)}, checkpoint_id=tmp_path / "a")


def test_without_a_daemon_the_disk_is_read_and_none_is_started(daemon, trainers, tmp_path):
    save_and_die(trainers, tmp_path / "a")
    stranger = trainers.start(CKPTD_EMBEDDED="1", CKPTD_RUNTIME_DIR=str(tmp_path / "nothing"))
    stranger.do(LOAD, mib=1, path=str(tmp_path / "a"))
    assert stranger.get(VALUES) == values("disk", 2.0)
    assert not (tmp_path / "nothing").exists()
    assert_holds(tmp_path / "a", value=2.0)
