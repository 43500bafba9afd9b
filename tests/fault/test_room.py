"""Too little room, or no way to write: refused with path and numbers, nothing left behind, and the next save works."""

import errno
import os
import re

import pytest
from support.clients import assert_holds
from support.mounts import need_root
from support.nursery import state
from support.processes import stopped, wait_gone
from support.strace import traced
from support.trainers import Ranks, TrainerRaised
from support.trees import below
from support.waiting import wait_until

MIB = 1 << 20
# Takes long enough in pages to be caught in the middle.
MIDDLE = 32


def failed(client, path, **options):
    """Save what cannot be saved and return the kind of the cause and the error's text."""
    future = client.async_save(state(**options), checkpoint_id=str(path))
    error = future.exception(30)
    assert error is not None
    assert future.state == "failed"
    return getattr(error, "cause_code", error.code), str(error)


def test_a_slot_that_is_too_small_is_refused_with_the_numbers(daemon, client, tmp_path):
    client.connect(slot_bytes=2 * 4096)
    cause, text = failed(client, tmp_path / "a")
    assert cause == "slot_too_small"
    assert "a slot has 8192" in text
    assert list(tmp_path.iterdir()) == []
    client.connect(slot_bytes=4 * MIB)
    client.save(state(), checkpoint_id=tmp_path / "a")
    assert_holds(tmp_path / "a")


def test_shared_memory_that_is_too_small_is_refused_before_anything_is_made(mounts, start_daemon, client, tmp_path):
    shm = mounts.tmpfs(mib=4, name="shm")
    daemon = start_daemon(shm_dir=str(shm))
    session = client.connect()
    cause, text = failed(client, tmp_path / "a", mib=8)
    assert cause == "shm_too_small"
    assert str(shm) in text
    assert re.search(r"needs \d{8} bytes .* has \d{7} free", text)
    assert below(daemon.runtime.arenas, "*.arena") == []
    assert not (tmp_path / "a").exists()
    assert not list(tmp_path.glob(".a*"))
    assert session.live
    client.save(state(mib=1), checkpoint_id=tmp_path / "a")
    assert_holds(tmp_path / "a")


def test_connect_says_at_once_that_the_arena_does_not_fit(mounts, start_daemon, client):
    shm = mounts.tmpfs(mib=4, name="shm")
    start_daemon(shm_dir=str(shm))
    wanted = 2 * 4 * MIB
    with pytest.raises(RuntimeError, match=rf"staging needs {wanted + 4096} bytes .*{shm}.* \d+ free; enlarge it"):
        client.connect(slot_bytes=4 * MIB)
    with pytest.raises(RuntimeError, match="shared memory"):
        client.connect(state(mib=8))
    client.connect(slot_bytes=MIB)


def test_of_two_ranks_that_ask_at_once_for_room_for_one_exactly_one_is_served(mounts, start_daemon, trainers):
    shm = mounts.tmpfs(mib=16, name="shm")
    daemon = start_daemon(shm_dir=str(shm))
    ranks = Ranks(trainers.start() for _ in range(2))
    for attempt in range(5):
        ranks.do(
            "refused = None\n"
            "try:\n"
            "    session = dcp.connect(job=job, rank=rank, world_size=2, slots=2, slot_bytes=6 << 20)\n"
            "except dcp.errors.ShmTooSmall as error:\n"
            "    refused = str(error)\n",
            job=f"job-{attempt}",
        )
        [refused] = [text for text in ranks.get("refused") if text is not None]
        assert f"needs {12 * MIB + 4096} bytes" in refused
        ranks.do("if refused is None:\n    session.close()")
        wait_until(lambda: not below(daemon.runtime.arenas, "*.arena"), "the end of the one that was made")


def test_a_state_that_grows_needs_no_room_for_the_arena_it_had_before(mounts, start_daemon, client, tmp_path):
    """A worker still has the old one mapped: its pages must go all the same."""
    shm = mounts.tmpfs(mib=24, name="shm")
    start_daemon(shm_dir=str(shm))
    client.save(state(4), checkpoint_id=tmp_path / "a")
    client.save(state(8, 2.0), checkpoint_id=tmp_path / "b")
    assert_holds(tmp_path / "a", mib=4)
    assert_holds(tmp_path / "b", mib=8, value=2.0)


def test_memory_that_is_kept_in_reserve_is_not_given_to_arenas(start_daemon, client):
    start_daemon(memory_reserve_fraction=0.999)
    with pytest.raises(RuntimeError, match=r"MemAvailable.* leaves 0 free; .*bytes kept in reserve"):
        client.connect(slot_bytes=MIB)


@pytest.fixture
def small_group(tmp_path):
    """A control group of 256 MiB; return a function that puts a process into it."""
    roots = {"/sys/fs/cgroup/memory": "memory.limit_in_bytes", "/sys/fs/cgroup": "memory.max"}
    root = next((root for root in roots if os.path.exists(f"{root}/cgroup.procs")), "")
    group = f"{root}/ckptd-test-{os.getpid()}"
    try:
        os.mkdir(group)
        with open(f"{group}/{roots.get(root, '')}", "w") as limit:
            limit.write(str(256 * MIB))
    except OSError as error:
        if os.path.isdir(group):
            os.rmdir(group)
        pytest.skip(f"no control group for memory can be made here: {error}")
    moved = []

    def put(pid):
        moved.append(pid)
        with open(f"{group}/cgroup.procs", "w") as members:
            members.write(str(pid))
        return group

    yield put
    for pid in moved:
        wait_gone(pid)
    os.rmdir(group)


@pytest.mark.parametrize("who", ["daemon", "trainer"])
def test_the_limit_of_a_control_group_is_kept(small_group, start_daemon, trainers, who):
    daemon = start_daemon(memory_reserve_bytes=64 * MIB)
    trainer = trainers.start()
    group = small_group({"daemon": daemon, "trainer": trainer}[who].pid)
    with pytest.raises(
        TrainerRaised, match=rf"control group {group}/memory\..* leaves \d+ free; .* of {256 * MIB} free"
    ):
        trainer.do("dcp.connect(slots=2, slot_bytes=128 << 20)")
    trainer.do("dcp.connect(slots=1, slot_bytes=32 << 20)")
    trainer.leave()
    daemon.stop()


def test_a_full_disk_is_named_with_its_numbers_and_nothing_is_left(mounts, daemon, client, tmp_path):
    disk = mounts.tmpfs(mib=4, name="disk")
    client.save(state(1), checkpoint_id=disk / "old")
    cause, text = failed(client, disk / "new", mib=8)
    assert cause == "disk_full"
    assert str(disk) in text
    wanted, free = map(int, re.search(r"(\d+) bytes wanted, (\d+) free", text).groups())
    assert wanted >= 8 * MIB > free
    client.save(state(8, 2.0), checkpoint_id=tmp_path / "elsewhere")
    assert_holds(tmp_path / "elsewhere", mib=8, value=2.0)
    assert sorted(path.name for path in disk.iterdir()) == ["old"]
    assert_holds(disk / "old")


def test_a_full_disk_is_refused_before_anything_is_staged(mounts, daemon, client, tmp_path):
    disk = mounts.tmpfs(mib=4, name="disk")
    cause, text = failed(client, disk / "deep" / "er" / "new", mib=8)
    assert cause == "disk_full"
    assert f"{disk}: " in text
    assert below(daemon.runtime.arenas, "*.arena") == []
    assert list(disk.iterdir()) == []


def test_saves_that_are_not_written_yet_count(mounts, daemon, client, tmp_path):
    disk = mounts.tmpfs(mib=20, name="disk")
    client.connect(slots=4)
    client.save(state(8), checkpoint_id=tmp_path / "elsewhere")
    with stopped(*daemon.workers()):
        sealed = [client.async_save(state(8), checkpoint_id=disk / name) for name in "ab"]
        client.async_save(state(8), checkpoint_id=tmp_path / "other").staging_completion.result(20)
        cause, text = failed(client, disk / "c", mib=8)
        assert cause == "disk_full"
        assert re.search(r"8\d{6} bytes wanted, 4\d{6} free beside 16\d{6} for saves under way", text)
    for future in sealed:
        future.result(20)
    client.save(state(2, 2.0), checkpoint_id=disk / "c")  # what is written is not counted twice
    assert_holds(disk / "c", mib=2, value=2.0)


def test_an_overwrite_needs_room_for_the_old_and_the_new(mounts, daemon, client):
    disk = mounts.tmpfs(mib=12, name="disk")
    client.save(state(8), checkpoint_id=disk / "a")
    assert failed(client, disk / "a", mib=8, value=2.0)[0] == "disk_full"
    assert_holds(disk / "a", mib=8)


def test_the_images_of_all_ranks_count_and_all_are_refused_alike(mounts, daemon, trainers):
    disk = mounts.tmpfs(mib=8, name="disk")
    ranks = trainers.job(2)
    save = "future = dcp.async_save({f'w{rank}': torch.ones(6 << 18)}, checkpoint_id=path)"
    ranks.do(save, path=str(disk / "a"))
    errors = ranks.get("outcome(future)")
    assert errors[0] == errors[1]
    assert re.search(rf"{disk}: 125\d{{5}} bytes wanted, 8\d{{6}} free", errors[0])
    assert list(disk.iterdir()) == []


def test_a_plan_of_a_save_that_fails_while_it_is_taken_in_is_not_kept(mounts, daemon, trainers):
    disk = mounts.tmpfs(mib=2, name="disk")
    ranks = trainers.job(2)
    ranks[1].do(
        "import ckptd.client.session.session as module\n"
        "make = module.make_rank_layout\n"
        "def make_late(*arguments, **options):\n"
        "    layout = make(*arguments, **options)\n"
        "    while session._saves:\n"  # until the other rank, which finds no room, has failed the save
        "        time.sleep(0.001)\n"
        "    return layout\n"
        "module.make_rank_layout = make_late"
    )
    save = "future = dcp.async_save(state(8), checkpoint_id=path)"
    ranks.do(save, path=str(disk / "a"))
    assert all(str(disk) in text for text in ranks.get("outcome(future)"))
    ranks[1].do("module.make_rank_layout = make")
    ranks.do(save, path=str(disk.parent / "b"))
    assert ranks.get("outcome(future)") == ["committed"] * 2


def test_a_rank_that_comes_late_counts_what_the_others_have_written_once(mounts, daemon, trainers):
    disk = mounts.tmpfs(mib=16, name="disk")
    ranks = trainers.job(2)
    save = "future = dcp.async_save({f'w{rank}': torch.ones(6 << 18)}, checkpoint_id=path)"
    ranks.do(save, path=str(disk.parent / "elsewhere"))
    assert ranks.get("outcome(future)") == ["committed"] * 2
    ranks[0].do(save, path=str(disk / "a"), rank=0)
    daemon.wait_for_save(disk / "a", lambda found: found["bytes_done"] > 6 * MIB)
    ranks[1].do(save, path=str(disk / "a"), rank=1)
    assert ranks.get("outcome(future)") == ["committed"] * 2


def test_a_disk_that_fills_up_on_the_way_fails_the_overwrite_and_keeps_the_old(mounts, daemon, client, tmp_path):
    disk = mounts.tmpfs(mib=8, name="disk")
    client.save(state(2), checkpoint_id=disk / "a")
    with (disk / "ballast").open("wb") as ballast:
        os.posix_fallocate(ballast.fileno(), 0, 4 * MIB)
    _, error = failed(client, disk / "a", mib=2, value=2.0)
    assert str(disk) in error
    assert_holds(disk / "a", mib=2)
    (disk / "ballast").unlink()
    client.save(state(2, 3.0), checkpoint_id=disk / "a")
    assert_holds(disk / "a", mib=2, value=3.0)


def fill(disk, *, but_bytes):
    """Leave so many bytes on a disk and no more."""
    volume = os.statvfs(disk)
    with (disk / "ballast").open("ab") as ballast:
        end = ballast.seek(0, os.SEEK_END)
        os.posix_fallocate(ballast.fileno(), end, volume.f_bavail * volume.f_frsize - but_bytes)


@pytest.mark.parametrize("file", [".ckptd", ".metadata"])
def test_a_disk_that_has_room_for_the_image_only(mounts, daemon, client, file):
    disk = mounts.tmpfs(mib=8, name="disk")
    client.save(state(2), checkpoint_id=disk / "a")
    image = (disk / "a" / "__0_0.distcp").stat().st_size
    fill(disk, but_bytes=image + (4096 if file == ".metadata" else 0))
    error = client.async_save(state(2, 2.0), checkpoint_id=disk / "a").exception(30)
    assert (error.call, error.errno) == ("write", errno.ENOSPC)
    assert error.path.endswith(f"/{file}")
    wait_until(lambda: sorted(path.name for path in disk.iterdir()) == ["a", "ballast"], "no leftovers")
    assert_holds(disk / "a", mib=2)
    (disk / "ballast").unlink()
    client.save(state(2, 3.0), checkpoint_id=disk / "a")
    assert_holds(disk / "a", mib=2, value=3.0)


@pytest.mark.parametrize("reserved", [True, False])
def test_a_disk_that_others_fill_in_the_middle_of_a_write(mounts, start_daemon, client, tmp_path, reserved):
    """What is reserved cannot be taken; where the file system reserves nothing, the write fails."""
    daemon = start_daemon(write_chunk_bytes=4096, write_threads=1)
    disk = mounts.tmpfs(mib=120, name="disk")
    client.save(state(MIDDLE), checkpoint_id=disk / "a")
    [worker] = daemon.workers()
    inject = [] if reserved else ["fallocate:error=EOPNOTSUPP"]
    with traced(worker, tmp_path / "calls.log", calls="fallocate", inject=inject):
        future = client.async_save(state(MIDDLE, 2.0), checkpoint_id=disk / "a")
        daemon.wait_for_save(disk / "a", lambda save: save["bytes_done"] > 0 and save["sequence"] == 2)
    with stopped(worker):
        [save] = [save for save in daemon.generations() if save["sequence"] == 2]
        assert save["bytes_done"] < save["bytes_total"]
        fill(disk, but_bytes=64 << 10)
    error = future.exception(30)
    if reserved:
        assert error is None
        assert_holds(disk / "a", mib=MIDDLE, value=2.0)
        return
    assert (error.call, error.errno) == ("pwrite", errno.ENOSPC)
    assert str(disk) in error.path
    assert_holds(disk / "a", mib=MIDDLE)
    (disk / "ballast").unlink()
    client.save(state(MIDDLE, 3.0), checkpoint_id=disk / "a")
    assert_holds(disk / "a", mib=MIDDLE, value=3.0)


def test_blocks_that_cannot_be_reserved_are_told_by_the_worker_and_nothing_is_left(
    mounts, start_daemon, client, tmp_path, monkeypatch
):
    """The disk filled up after everybody had looked: the looks are taken away here."""
    disk = mounts.tmpfs(mib=4, name="disk")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'ckptd.daemon.workers.worker' in sys.orig_argv:\n"
        "    import ckptd.checkpoint.image.write as write\n"
        "    write.check_room = lambda directory, wanted_bytes: None\n"
    )
    monkeypatch.setattr("ckptd.client.session.session.claim_room", lambda *_: None)
    daemon = start_daemon(environment={"PYTHONPATH": str(tmp_path / "site")})
    cause, text = failed(client, disk / "a", mib=8)
    assert cause == "system_call_failed"
    assert re.search(rf"fallocate {disk}/\.a\.ckptd-.*/__0_0.distcp: No space left on device \(errno 28\)", text)
    daemon.wait_for_save(disk / "a", lambda save: save["state"] == "failed")
    wait_until(lambda: list(disk.iterdir()) == [], "the removal of what was written")
    client.save(state(1), checkpoint_id=disk / "a")
    assert_holds(disk / "a")


@pytest.mark.parametrize("where", ["parent", "grandparent"])
def test_a_parent_that_is_a_file_is_named(daemon, client, tmp_path, where):
    (tmp_path / "file").write_text("in the way")
    target = tmp_path / "file" / ("a" if where == "parent" else "b/a")
    _, error = failed(client, target)
    assert str(tmp_path / "file") in error
    assert "Not a directory" in error or "File exists" in error
    assert (tmp_path / "file").read_text() == "in the way"
    client.save(state(), checkpoint_id=tmp_path / "ok")
    assert_holds(tmp_path / "ok")


@pytest.mark.parametrize("what", ["file", "link to a directory"])
def test_an_id_that_is_no_directory_is_left_alone(daemon, client, tmp_path, what):
    target = tmp_path / "a"
    if what == "file":
        target.write_text("mine")
    else:
        (tmp_path / "elsewhere").mkdir()
        target.symlink_to("elsewhere")
    _, error = failed(client, target)
    assert str(target) in error
    assert target.is_symlink() or target.read_text() == "mine"


def test_a_read_only_file_system_is_named(mounts, daemon, client, tmp_path):
    need_root("a remount")
    disk = mounts.tmpfs(mib=8, name="disk")
    client.save(state(), checkpoint_id=disk / "a")
    mounts.read_only(disk)
    try:
        _, error = failed(client, disk / "a", value=2.0)
        assert "Read-only file system" in error
        assert str(disk) in error
        assert_holds(disk / "a")
    finally:
        mounts.writable(disk)
    client.save(state(value=3.0), checkpoint_id=disk / "a")
    assert_holds(disk / "a", value=3.0)


def test_a_failed_write_names_the_rank_on_all_ranks(mounts, daemon, trainers):
    disk = mounts.tmpfs(mib=2, name="disk")
    ranks = trainers.job(2)
    ranks.do("future = dcp.async_save(state(8), checkpoint_id=path)", path=str(disk / "a"))
    errors = ranks.get("outcome(future)")
    assert errors[0] == errors[1]
    assert "rank " in errors[0]
    assert str(disk) in errors[0]
    ranks.do("future = dcp.async_save(state(8), checkpoint_id=path)", path=str(disk.parent / "b"))
    assert ranks.get("outcome(future)") == ["committed"] * 2
    assert list(disk.iterdir()) == []
