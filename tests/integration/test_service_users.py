"""The service as systemd runs it: ready when it says so, for all users, within its limits."""

from __future__ import annotations

import json

from support.systemd_host import ALICE, BOB, CKPTD


def test_start_returns_when_the_daemon_is_ready(service):
    service.run("systemctl", "start", "ckptd.service")
    status = service.status()
    assert str(status["pid"]) == service.show("MainPID")
    assert status["mode"] == "system"
    assert (service.show("ActiveState"), service.show("SubState")) == ("active", "running")
    assert service.show("StatusText") == "no jobs"
    assert service.show("Slice") == "ckptd.slice"
    assert service.show("NRestarts") == "0"
    weights = {name: service.show(name, "ckptd.slice") for name in ("CPUWeight", "IOWeight", "MemoryLow")}
    assert weights == {"CPUWeight": "20", "IOWeight": "50", "MemoryLow": str(256 << 20)}


def test_two_users_save_at_once_into_folders_that_only_they_can_enter(service, users):
    service.run("systemctl", "start", "ckptd.service")
    trainers = {f"/home/{name}/run/a": users(uid) for name, uid in (("alice", ALICE), ("bob", BOB))}
    for path, trainer in trainers.items():
        trainer.do("session = dcp.connect()")
        trainer.do("future = dcp.async_save(state(8, float(os.getuid())), checkpoint_id=path)", path=path)
    for path, trainer in trainers.items():
        assert trainer.get("outcome(future)") == "committed"
        trainer.do("target = state(8, -1.0); dcp.load(target, checkpoint_id=path)", path=path)
        assert trainer.get("target['model']['w'].unique().tolist() == [os.getuid()]")
    for path, uid in zip(trainers, (ALICE, BOB), strict=True):
        assert set(service.run("find", path, "-printf", "%U\n").split()) == {str(uid)}
    jobs = {job["uid"]: job for job in service.status()["jobs"]}
    assert set(jobs) == {ALICE, BOB}
    for uid, job in jobs.items():
        for pid in job["workers"]:
            assert service.run("stat", "-c", "%u", f"/proc/{pid}").strip() == str(uid)
    assert service.wait_show("StatusText", lambda text: text.startswith("2 jobs with 2 ranks"))
    seen = json.loads(service.run(CKPTD, "status", "--json", uid=BOB, environment={"HOME": "/home/bob"}))
    assert seen["mode"] == "system", "whom a user's trainers find, that user's commands find, too"
    assert "ckptd-0-" in service.run("ls", "-A", "/dev/shm"), "arenas lie on the node's own /dev/shm"


def test_one_user_gets_nothing_into_another_ones_folder(service, users):
    service.run("systemctl", "start", "ckptd.service")
    alice = users(ALICE)
    for path in ("/home/bob/stolen", "/etc/stolen", "/usr/stolen"):
        alice.do("future = dcp.async_save(state(1), checkpoint_id=path)", path=path)
        assert "Permission denied" in alice.get("outcome(future)") or path.startswith(("/etc", "/usr"))
        assert service.call("ls", path).returncode != 0


def limits_of(host, pid):
    """Return soft and hard limits of a process."""
    lines = host.read(f"/proc/{pid}/limits").splitlines()[1:]
    return {line[:26].strip(): tuple(line[26:].split()[:2]) for line in lines}


def may_raise_limits(host):
    """Say whether systemd here has CAP_SYS_RESOURCE."""
    [capabilities] = [line.split()[1] for line in host.read("/proc/1/status").splitlines() if "CapEff" in line]
    return bool(int(capabilities, 16) & 1 << 24)


def test_limits_are_in_force(service, users):
    service.run("systemctl", "start", "ckptd.service")
    alice = users(ALICE)
    alice.do("dcp.save(state(1), checkpoint_id='/home/alice/a')")
    status = service.status()
    wanted = {name: service.show(f"Limit{name}") for name in ("MEMLOCK", "NOFILE")}
    assert wanted == {"MEMLOCK": "infinity", "NOFILE": "65536"}
    daemon, manager = limits_of(service, status["pid"]), limits_of(service, 1)
    adjusted = {pid: int(service.read(f"/proc/{pid}/oom_score_adj")) for pid in (status["pid"], *status["workers"])}
    if may_raise_limits(service):
        assert daemon["Max locked memory"] == ("unlimited", "unlimited")
        assert daemon["Max open files"] == ("65536", "65536")
        assert adjusted[status["pid"]] == -900
    else:  # as in many containers: systemd then goes as far as its own limits
        for name in ("Max locked memory", "Max open files"):
            assert daemon[name] == (manager[name][1],) * 2
        assert adjusted[status["pid"]] <= 0
    assert status["workers"]
    assert all(adjusted[pid] == 100 for pid in status["workers"]), "a worker goes before its daemon and any trainer"
    assert service.show("OOMPolicy") == "continue"


def test_the_daemon_keeps_five_capabilities_and_workers_none(service, users):
    service.run("systemctl", "start", "ckptd.service")
    alice = users(ALICE)
    alice.do("dcp.save(state(1), checkpoint_id='/home/alice/a')")
    status = service.status()

    def effective(pid):
        lines = service.read(f"/proc/{pid}/status").splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        return int(fields["CapEff"], 16), int(fields["CapBnd"], 16), fields["NoNewPrivs"].strip()

    # chown 0, dac_override 1, kill 5, setgid 6, setuid 7: capabilities(7)
    kept = sum(1 << number for number in (0, 1, 5, 6, 7))
    assert effective(status["pid"]) == (kept, kept, "1")
    for pid in status["workers"]:
        assert effective(pid)[0] == 0


def test_the_units_are_valid_and_little_exposed(service):
    checked = service.call("systemd-analyze", "verify", "ckptd.service", "ckptd.socket", "ckptd.slice")
    assert (checked.returncode, checked.stderr) == (0, "")
    service.run("systemd-analyze", "security", "--offline=true", "--threshold=30", "/etc/systemd/system/ckptd.service")


def test_only_the_group_may_connect_where_the_site_says_so(service, users):
    service.drop_in("ckptd.socket", "[Socket]\nSocketMode=0660\n")
    service.run("systemctl", "start", "ckptd.socket")
    assert service.run("stat", "-c", "%U:%G %a", "/run/ckptd/attach.sock").split() == ["root:ckptd", "660"]
    service.run("systemctl", "start", "ckptd.service")
    alice = users(ALICE)
    alice.do("future = None\ntry:\n  dcp.connect()\nexcept Exception as error:\n  said = str(error)")
    assert "Permission denied" in alice.get("said")


def test_uninstall_leaves_nothing_but_a_changed_configuration(service):
    service.run("systemctl", "enable", "--now", "ckptd.socket", "ckptd.service")
    service.run(CKPTD, "uninstall")
    assert service.show("LoadState") == "not-found"
    assert service.show("LoadState", "ckptd.socket") == "not-found"
    left = service.run("find", "/etc", "/run", "/usr/lib/systemd", "-name", "*ckptd*", "-not", "-name", "ckptd-test*")
    assert sorted(left.split()) == ["/etc/ckptd", "/etc/ckptd/ckptd.toml", "/run/ckptd"]
    assert service.call("ls", "/run/ckptd/attach.sock").returncode != 0
    service.run("rm", "/etc/ckptd/ckptd.toml")
    service.run(CKPTD, "install")
    service.run(CKPTD, "uninstall")
    assert service.call("ls", "/etc/ckptd/ckptd.toml").returncode != 0, "an unchanged configuration goes, too"
