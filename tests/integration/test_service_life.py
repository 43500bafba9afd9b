"""What becomes of the service and its saves: killed, hung, stopped, started by a trainer, given a new file."""

from __future__ import annotations

import time

import pytest
from support.systemd_host import ALICE, BOB, CONFIG
from support.waiting import wait_until

PATH = "/home/alice/a"


@pytest.fixture
def running(service):
    service.run("systemctl", "start", "ckptd.socket", "ckptd.service")
    return service


def restarted(host, times=1):
    """Wait until the service has come back so often."""
    host.wait_show("NRestarts", lambda value: int(value) >= times, timeout_s=60)
    host.wait_show("ActiveState", lambda value: value == "active", timeout_s=60)


def committed(trainer, path=PATH):
    """Save and say what came of it."""
    trainer.do("future = dcp.async_save(state(1), checkpoint_id=path)", path=path)
    return trainer.get("outcome(future)")


def test_a_killed_daemon_is_started_again_and_the_next_save_works(running, users):
    alice = users(ALICE)
    assert committed(alice) == "committed"
    pid = running.show("MainPID")
    running.run("systemctl", "kill", "--kill-whom=main", "--signal=KILL", "ckptd.service")
    restarted(running)
    assert running.show("MainPID") not in {pid, "0"}
    assert running.status()["pid"] == int(running.show("MainPID"))
    assert committed(alice, "/home/alice/b") == "committed"
    assert committed(users(BOB), "/home/bob/a") == "committed"


def test_a_sealed_save_is_finished_by_the_daemon_that_is_started_again(running, users):
    alice = users(ALICE)
    assert committed(alice) == "committed"
    running.run("kill", "-STOP", *(str(pid) for pid in running.status()["workers"]))
    alice.do("future = dcp.async_save(state(1, 2.0), checkpoint_id='/home/alice/last')")
    alice.do("future.staging_completion.result(30)")
    wait_until(lambda: "staged" in [save["state"] for save in saves(running)], "the sealed save")
    running.run("systemctl", "kill", "--kill-whom=main", "--signal=KILL", "ckptd.service")
    assert alice.get("outcome(future)") == "committed"
    assert int(running.show("NRestarts")) == 1
    alice.do("target = state(1, -1.0); dcp.load(target, checkpoint_id='/home/alice/last')")
    assert alice.get("target['model']['w'].unique().tolist()") == [2.0]


def test_a_restart_costs_an_attached_trainer_nothing(running, users):
    alice = users(ALICE)
    assert committed(alice) == "committed"
    running.run("systemctl", "restart", "ckptd.service")
    assert committed(alice, "/home/alice/b") == "committed"
    assert running.show("NRestarts") == "0"
    [job] = running.status()["jobs"]
    assert job["incarnation"] == 1, "it is the same session"


def test_a_daemon_that_hangs_is_killed_by_the_watchdog(running, users):
    running.drop_in("ckptd.service", "[Service]\nWatchdogSec=3s\n")
    running.run("systemctl", "restart", "ckptd.service")
    pid = running.show("MainPID")
    running.run("kill", "-STOP", pid)
    restarted(running)
    assert running.show("MainPID") != pid
    assert "Fatal Python error: Aborted" in running.journal(), "where it hung stands in the log"
    assert committed(users(ALICE)) == "committed"


def test_a_daemon_at_work_is_left_alone_by_the_watchdog(running, users):
    running.drop_in("ckptd.service", "[Service]\nWatchdogSec=3s\n")
    running.run("systemctl", "restart", "ckptd.service")
    alice = users(ALICE)
    begun = time.monotonic()
    number = 0
    while time.monotonic() - begun < 5:  # longer than the watchdog waits
        assert committed(alice, f"/home/alice/{number % 2}") == "committed"
        number += 1
    assert (running.show("NRestarts"), running.show("ActiveState")) == ("0", "active")


def test_a_stop_waits_for_the_save_in_flight(running, users):
    alice = users(ALICE)
    assert committed(alice) == "committed"
    workers = [str(pid) for pid in running.status()["workers"]]
    running.run("kill", "-STOP", *workers)
    alice.do("future = dcp.async_save(state(1, 2.0), checkpoint_id='/home/alice/last')")
    alice.do("future.staging_completion.result(30)")
    wait_until(lambda: "staged" in [save["state"] for save in saves(running)], "the sealed save")
    running.run("systemctl", "stop", "--no-block", "ckptd.socket", "ckptd.service")
    running.wait_show("SubState", lambda value: value == "stop-sigterm")
    running.wait_show("StatusText", lambda text: text.startswith("stopping; 1 job with 1 rank; saving 1 checkpoint"))
    running.run("kill", "-CONT", *workers)
    assert alice.get("outcome(future)") == "committed"
    running.wait_show("ActiveState", lambda value: value == "inactive")
    assert (running.show("Result"), running.show("NRestarts")) == ("success", "0")
    assert "committed /home/alice/last" in running.journal()
    running.run("ls", "/home/alice/last/.metadata")


def saves(host):
    return [save for job in host.status()["jobs"] for save in job["generations"]]


def test_a_trainer_may_connect_before_the_daemon_is_up(service, users):
    service.run("systemctl", "start", "ckptd.socket")
    assert service.show("ActiveState") == "inactive"
    assert committed(users(ALICE)) == "committed"
    assert service.show("ActiveState") == "active"
    service.run("systemctl", "stop", "ckptd.service")  # the socket stays, and starts it for the next one
    assert committed(users(BOB), "/home/bob/a") == "committed"


def test_a_restart_loop_loses_no_connection_attempt(service, users):
    service.write(CONFIG, "write_threads = 0\n")
    service.run("systemctl", "start", "ckptd.socket")
    alice = users(ALICE)
    alice.start("session = dcp.connect(); dcp.save(state(1), checkpoint_id=path)", path=PATH)
    service.wait_show("NRestarts", lambda value: int(value) >= 4, timeout_s=60)
    assert service.show("ActiveState", "ckptd.socket") == "active"
    service.configure()
    alice.finish()
    service.run("ls", f"{PATH}/.metadata")
    named = [line for line in service.journal().splitlines() if line.startswith(f"ckptd: {CONFIG}: write_threads: ")]
    assert len(named) >= 4, "each try says in one line what is wrong with the file"


def test_a_reload_changes_what_it_can_and_names_what_it_cannot(running, users):
    alice = users(ALICE)
    assert committed(alice) == "committed"
    pid = running.show("MainPID")
    running.configure(write_threads=7, session_timeout_s=33.0)
    running.run("systemctl", "reload", "ckptd.service")
    running.wait_show("StatusText", lambda text: "restart needed for session_timeout_s" in text)
    assert "reload: changed write_threads; restart needed for session_timeout_s" in running.journal()
    assert (running.show("MainPID"), running.show("ActiveState")) == (pid, "active")
    assert committed(alice, "/home/alice/b") == "committed"


@pytest.mark.parametrize("text", ["write_threads = 0", "writers = 4", "http ="])
def test_a_bad_file_keeps_the_old_configuration_and_says_so(running, users, text):
    pid = running.show("MainPID")
    running.write(CONFIG, text)
    running.run("systemctl", "reload", "ckptd.service")
    running.wait_show("StatusText", lambda value: f"old configuration kept: {CONFIG}: " in value)
    [line] = running.journal("err").splitlines()
    assert line.startswith(f"ckptd.daemon.systemd.managed: reload: old configuration kept: {CONFIG}: ")
    assert (running.show("MainPID"), running.show("ActiveState")) == (pid, "active")
    assert committed(users(ALICE)) == "committed"


def test_the_managers_socket_is_not_taken_away_from_it(service, users):
    service.run("systemctl", "start", "ckptd.socket")
    second = service.ckptd("serve", "--http", "127.0.0.1:0")
    assert (second.returncode, second.stdout) == (1, "")
    assert second.stderr == "ckptd: bind /run/ckptd/attach.sock: Address already in use (errno 98)\n"
    assert "ckptd-0-" not in service.run("ls", "-A", "/dev/shm")
    assert committed(users(ALICE)) == "committed"


def test_a_taken_port_is_one_line(running):
    taken = running.status()["http"]
    second = running.ckptd("serve", "--http", taken, environment={"CKPTD_RUNTIME_DIR": "/run/second"})
    assert (second.returncode, second.stdout) == (1, "")
    assert second.stderr == f"ckptd: bind {taken}: Address already in use (errno 98)\n"
