"""A daemon that was killed has a successor: it finishes what was sealed, and trainers that live go on with it."""

import os
import shutil
import signal

import pytest
from support.clients import assert_holds
from support.processes import stopped, wait_gone
from support.trees import below
from support.waiting import wait_until


def committed(save):
    return save["state"] == "committed"


def kill_all(daemon):
    """Kill a daemon and wait for its workers, which follow it."""
    workers = daemon.status()["workers"]
    daemon.kill()
    for worker in workers:
        wait_gone(worker)


def kill_while_sealed(daemon, trainer, path, value=2.0, *, mib=1):
    """Leave a sealed save, of which nothing is written, to the next daemon."""
    with stopped(*daemon.workers()):
        trainer.do(f"future = dcp.async_save(state({mib}, {value}), checkpoint_id=path)", path=str(path))
        daemon.wait_for_save(path, lambda save: save["state"] == "staged")
        workers = daemon.workers()
        daemon.kill()
    for worker in workers:
        wait_gone(worker)


def test_a_living_trainer_goes_on_with_the_successor(start_daemon, trainers, tmp_path):
    daemon = start_daemon()
    trainer = trainers.start()
    trainer.do("session = dcp.connect()\ndcp.save(state(), checkpoint_id=path)", path=str(tmp_path / "a"))
    kill_while_sealed(daemon, trainer, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    successor = start_daemon()
    assert trainer.get("outcome(future)") == "committed"
    assert_holds(tmp_path / "b", value=2.0)
    assert trainer.get("session.live and session.incarnation == 1 and session.daemon_pid") == successor.pid
    # It saves on in the same session and the same arena, under the same plan.
    [arena] = below(successor.runtime.arenas, "*.arena")
    for value in (3.0, 4.0, 5.0):
        trainer.do(f"dcp.save(state(value={value}), checkpoint_id=path)", path=str(tmp_path / f"{value}"))
        assert_holds(tmp_path / f"{value}", value=value)
    assert below(successor.runtime.arenas, "*.arena") == [arena]
    assert successor.metric('ckptd_phase_seconds_count{phase="plan"}') >= 3
    assert len(below(successor.runtime.arenas, "*.plan")) == 1
    daemon.runtime.daemon_was_killed = False


def test_a_sealed_save_survives_its_trainer_and_its_daemon(start_daemon, trainers, tmp_path):
    daemon = start_daemon()
    trainer = trainers.start()
    trainer.do("dcp.save(state(), checkpoint_id=path)", path=str(tmp_path / "a"))
    kill_while_sealed(daemon, trainer, tmp_path / "b")
    trainer.kill()
    successor = start_daemon()
    successor.wait_for_save(tmp_path / "b", committed)
    assert_holds(tmp_path / "b", value=2.0)
    wait_until(lambda: not list(successor.runtime.arenas.iterdir()), "the end of the dead trainer's arena")
    daemon.runtime.daemon_was_killed = False


def test_a_seal_that_no_daemon_has_heard_of_is_found_in_the_arena(start_daemon, trainers, tmp_path):
    daemon = start_daemon()
    trainer = trainers.start()
    trainer.do("session = dcp.connect()\ndcp.save(state(), checkpoint_id=path)", path=str(tmp_path / "a"))
    kill_all(daemon)
    trainer.do("future = dcp.async_save(state(value=2.0), checkpoint_id=path)", path=str(tmp_path / "b"))
    assert trainer.get("future.state") == "staged"
    trainer.kill()
    start_daemon().wait_for_save(tmp_path / "b", committed)
    assert_holds(tmp_path / "b", value=2.0)
    daemon.runtime.daemon_was_killed = False


def test_saves_go_on_while_no_daemon_runs(start_daemon, trainers, tmp_path):
    daemon = start_daemon()
    trainer = trainers.start()
    trainer.do("session = dcp.connect()\ndcp.save(state(), checkpoint_id=path)", path=str(tmp_path / "0"))
    kill_all(daemon)
    for number in (1, 2):
        trainer.do(
            "futures = globals().get('futures', [])\n"
            f"futures.append(dcp.async_save(state(value={number}.0), checkpoint_id=path))",
            path=str(tmp_path / str(number)),
        )
    start_daemon()
    assert trainer.get("[outcome(future) for future in futures]") == ["committed"] * 2
    for number in (1, 2):
        assert_holds(tmp_path / str(number), value=float(number))
    daemon.runtime.daemon_was_killed = False


@pytest.mark.parametrize("dead", [[], [1], [0, 1]])
def test_ranks_that_had_all_sealed_need_not_live(start_daemon, trainers, tmp_path, dead):
    daemon = start_daemon()
    ranks = trainers.job(2)
    ranks.do("dcp.save({'own': {f'r{rank}': torch.ones(9)}}, checkpoint_id=path)", path=str(tmp_path / "a"))
    with stopped(*daemon.workers(2)):
        ranks.do(
            "future = dcp.async_save({'own': {f'r{rank}': torch.full((9,), 2.0)}}, checkpoint_id=path)",
            path=str(tmp_path / "b"),
        )
        daemon.wait_for_save(tmp_path / "b", lambda save: save["ranks_sealed"] == 2)
        workers = daemon.workers(2)
        daemon.kill()
    for worker in workers:
        wait_gone(worker)
    for rank in dead:
        ranks[rank].kill()
    successor = start_daemon()
    successor.wait_for_save(tmp_path / "b", committed)
    assert [r.get("outcome(future)") for n, r in enumerate(ranks) if n not in dead] == ["committed"] * (2 - len(dead))
    daemon.runtime.daemon_was_killed = False


def test_a_rank_that_died_unsealed_fails_the_save_at_the_successor(start_daemon, trainers, tmp_path):
    daemon = start_daemon()
    ranks = trainers.job(2)
    ranks.do("dcp.save(state(), checkpoint_id=path)", path=str(tmp_path / "a"))
    ranks[0].do("future = dcp.async_save(state(value=2.0), checkpoint_id=path)", path=str(tmp_path / "b"))
    daemon.wait_for_save(tmp_path / "b", lambda save: save["ranks_sealed"] == 1)
    kill_all(daemon)
    ranks[1].kill()
    successor = start_daemon()
    assert "rank 1" in ranks[0].get("outcome(future)")
    wait_until(lambda: successor.wait_for_save(tmp_path / "b", lambda save: save["state"] == "failed"), "the failure")
    wait_until(lambda: not daemon.runtime.litter(), "the removal of what was written")
    assert not (tmp_path / "b").exists()
    daemon.runtime.daemon_was_killed = False


def test_a_rank_that_lives_completes_the_save_at_the_successor(start_daemon, trainers, tmp_path):
    daemon = start_daemon()
    ranks = trainers.job(2)
    ranks.do("dcp.save(state(), checkpoint_id=path)", path=str(tmp_path / "a"))
    ranks[0].do("future = dcp.async_save(state(value=2.0), checkpoint_id=path)", path=str(tmp_path / "b"))
    daemon.wait_for_save(tmp_path / "b", lambda save: save["ranks_sealed"] == 1)
    kill_all(daemon)
    start_daemon()
    ranks[1].do("future = dcp.async_save(state(value=2.0), checkpoint_id=path)", path=str(tmp_path / "b"))
    assert ranks.get("outcome(future)") == ["committed"] * 2
    assert_holds(tmp_path / "b", value=2.0)
    daemon.runtime.daemon_was_killed = False


def test_a_new_structure_is_planned_by_the_successor(start_daemon, trainers, tmp_path):
    daemon = start_daemon()
    ranks = trainers.job(2)
    ranks.do("dcp.save(state(), checkpoint_id=path)", path=str(tmp_path / "a"))
    ranks.do("wider = {**state(value=2.0), 'more': torch.ones(rank + 1, 3)} if rank == 0 else state(value=2.0)")
    # Rank 1's structure is unchanged: it seals. Rank 0 proposes, and the plan is not made before the daemon dies.
    with stopped(*daemon.workers(2)):
        ranks[1].do("future = dcp.async_save(wider, checkpoint_id=path)", path=str(tmp_path / "b"))
        ranks[0].start("future = dcp.async_save(wider, checkpoint_id=path)", path=str(tmp_path / "b"))
        daemon.wait_for_save(tmp_path / "b", lambda save: save["ranks_sealed"] == 1)
        workers = daemon.workers(2)
        daemon.kill()
    for worker in workers:
        wait_gone(worker)
    start_daemon()
    ranks[0].finish()
    assert ranks.get("outcome(future)") == ["committed"] * 2
    daemon.runtime.daemon_was_killed = False


def test_an_older_incarnation_is_fenced_by_the_successor(start_daemon, trainers, tmp_path):
    daemon = start_daemon()
    [old] = trainers.job(1, name="again")
    old.do("dcp.save(state(), checkpoint_id=path)", path=str(tmp_path / "a"))
    with stopped(old.pid):
        kill_all(daemon)
        start_daemon(session_timeout_s=1.0)
        [new] = trainers.job(1, name="other")
        new.do("dcp.save(state(value=2.0), checkpoint_id=path)", path=str(tmp_path / "a"))
    assert_holds(tmp_path / "a", value=2.0)
    old.do("future = dcp.async_save(state(value=3.0), checkpoint_id=path)", path=str(tmp_path / "b"))
    assert old.get("outcome(future)") == "committed"
    daemon.runtime.daemon_was_killed = False


def test_a_daemon_that_is_stopped_in_order_leaves_its_sessions_to_the_next(start_daemon, trainers, tmp_path):
    daemon = start_daemon()
    trainer = trainers.start()
    trainer.do("session = dcp.connect()\ndcp.save(state(), checkpoint_id=path)", path=str(tmp_path / "a"))
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    trainer.do("future = dcp.async_save(state(value=2.0), checkpoint_id=path)", path=str(tmp_path / "b"))
    successor = start_daemon()
    assert trainer.get("outcome(future)") == "committed"
    assert trainer.get("session.daemon_pid") == successor.pid
    assert_holds(tmp_path / "b", value=2.0)


def test_what_a_stopped_daemon_could_not_finish_is_left_to_the_next(start_daemon, trainers, tmp_path):
    daemon = start_daemon(stop_timeout_s=0.2)
    trainer = trainers.start()
    trainer.do("session = dcp.connect()\ndcp.save(state(), checkpoint_id=path)", path=str(tmp_path / "a"))
    with stopped(*daemon.workers()):
        trainer.do("future = dcp.async_save(state(value=2.0), checkpoint_id=path)", path=str(tmp_path / "b"))
        daemon.wait_for_save(tmp_path / "b", lambda save: save["state"] == "staged")
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
    assert not (tmp_path / "b").exists()
    start_daemon()
    assert trainer.get("outcome(future)") == "committed"
    assert_holds(tmp_path / "b", value=2.0)


def test_an_embedded_daemon_is_started_again_by_whoever_needs_it(runtime, trainers, tmp_path):
    trainer = trainers.start(CKPTD_EMBEDDED="1", CKPTD_CONFIG=runtime.configure())
    trainer.do("session = dcp.connect()\ndcp.save(state(), checkpoint_id=path)", path=str(tmp_path / "a"))
    first = trainer.get("session.daemon_pid")
    os.kill(first, signal.SIGKILL)
    wait_gone(first)
    trainer.do("future = dcp.async_save(state(value=2.0), checkpoint_id=path)", path=str(tmp_path / "b"))
    assert trainer.get("outcome(future)") == "committed"
    assert_holds(tmp_path / "b", value=2.0)
    assert trainer.get("session.daemon_pid") != first


def test_another_daemon_with_the_same_state_folder_finishes_what_a_dead_one_left(
    mounts, start_daemon, trainers, tmp_path
):
    shm = {"shm_dir": str(mounts.tmpfs(mib=64, name="shm"))}  # others' orphans are none of ours
    daemon = start_daemon(**shm)
    trainer = trainers.start()
    trainer.do("dcp.save(state(), checkpoint_id=path)", path=str(tmp_path / "a"))
    kill_while_sealed(daemon, trainer, tmp_path / "b")
    trainer.kill()
    elsewhere = f"{daemon.runtime.path}/elsewhere"
    other = start_daemon(environment={"CKPTD_RUNTIME_DIR": elsewhere}, orphan_timeout_s=0.001, at=elsewhere, **shm)
    other.wait_for_save(tmp_path / "b", committed)
    assert_holds(tmp_path / "b", value=2.0)
    wait_until(lambda: not daemon.runtime.arenas.exists(), "the end of the dead daemon's shared memory")


def test_another_daemon_leaves_a_dead_one_s_living_trainers_alone(mounts, start_daemon, trainers, tmp_path):
    shm = {"shm_dir": str(mounts.tmpfs(mib=64, name="shm"))}  # others' orphans are none of ours
    daemon = start_daemon(**shm)
    trainer = trainers.start()
    trainer.do("session = dcp.connect()\ndcp.save(state(), checkpoint_id=path)", path=str(tmp_path / "a"))
    kill_while_sealed(daemon, trainer, tmp_path / "b")
    elsewhere = f"{daemon.runtime.path}/elsewhere"
    other = start_daemon(environment={"CKPTD_RUNTIME_DIR": elsewhere}, orphan_timeout_s=0.001, at=elsewhere, **shm)
    assert other.generations() == []
    assert daemon.runtime.arenas.exists()
    start_daemon(**shm)
    assert trainer.get("outcome(future)") == "committed"
    daemon.runtime.daemon_was_killed = False


def test_a_journal_that_is_no_journal_is_put_aside(start_daemon, trainers, tmp_path):
    daemon = start_daemon()
    trainer = trainers.start()
    trainer.do("dcp.connect(reconnect_timeout_s=20)\ndcp.save(state(), checkpoint_id=path)", path=str(tmp_path / "a"))
    kill_all(daemon)
    [journal] = daemon.runtime.journals().glob("*/journal.db")
    journal.write_bytes(os.urandom(8192))
    journal.with_name("journal.db-wal").write_bytes(os.urandom(8192))
    successor = start_daemon()
    assert "cannot be used" in successor.log()
    # It knows nobody: the trainer opens a new session.
    trainer.do("future = dcp.async_save(state(value=2.0), checkpoint_id=path)", path=str(tmp_path / "b"))
    trainer.get("outcome(future)")
    trainer.do("dcp.save(state(value=3.0), checkpoint_id=path)", path=str(tmp_path / "c"))
    assert_holds(tmp_path / "c", value=3.0)


def test_a_sealed_save_whose_memory_is_gone_fails_and_says_so(start_daemon, trainers, tmp_path):
    daemon = start_daemon()
    trainer = trainers.start()
    trainer.do("dcp.save(state(), checkpoint_id=path)", path=str(tmp_path / "a"))
    kill_while_sealed(daemon, trainer, tmp_path / "b")
    shutil.rmtree(daemon.runtime.arenas)
    successor = start_daemon()
    failed = successor.wait_for_save(tmp_path / "b", lambda save: save["state"] == "failed")
    assert ".arena" in failed["error"]
    assert trainer.get("outcome(future)") != "committed"
    assert not (tmp_path / "b").exists()


def test_an_arena_that_its_trainer_removed_for_want_of_a_daemon_is_not_missed(start_daemon, trainers, tmp_path):
    daemon = start_daemon(retain_s=60.0)
    trainer = trainers.start()
    trainer.do("session = dcp.connect()\ndcp.save(state(), checkpoint_id=path)", path=str(tmp_path / "a"))
    kill_all(daemon)
    wait_until(lambda: trainer.get("session._link.resuming"), "the trainer's notice")
    successor = start_daemon(retain_s=60.0)
    [arena] = below(successor.runtime.arenas, "*.arena")
    arena.unlink()  # as the trainer does if it ends just before its daemon's successor has begun
    trainer.do("session.close()")
    late = trainers.start()
    late.do("dcp.save(state(value=2.0), checkpoint_id=path)", path=str(tmp_path / "a"))
    assert_holds(tmp_path / "a", value=2.0)
    daemon.runtime.daemon_was_killed = False  # and no bug is in the log
