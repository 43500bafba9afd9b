"""`ckptd doctor` on a host where the service is in order, and where it is not."""

from __future__ import annotations

import json

import pytest
from support.systemd_host import CONFIG

UNIT = "/etc/systemd/system/ckptd.service"


def doctor(host):
    """Return the exit status and the checks by name."""
    done = host.ckptd("doctor", "/var/tmp", "--json")
    assert done.stderr == ""
    return done.returncode, {check["name"]: check for check in json.loads(done.stdout)["checks"]}


def test_a_service_in_order(service):
    service.run("systemctl", "enable", "--now", "ckptd.socket", "ckptd.service")
    status, checks = doctor(service)
    assert status == 0
    for name in ("system's ckptd.socket", "system's ckptd.service", "daemon", "configuration"):
        assert checks[name]["verdict"] == "ok", checks[name]
    assert checks["system's ckptd.service"]["found"] == f"{UNIT}, enabled, active"
    assert checks["daemon"]["found"].startswith(f"pid {service.show('MainPID')}, ")


def test_a_missing_unit_is_named(service):
    service.run("rm", UNIT)
    service.run("systemctl", "daemon-reload")
    status, checks = doctor(service)
    assert checks["system's ckptd.service"]["found"] == "missing"
    assert checks["system's ckptd.service"]["remedy"] == "`ckptd install` puts it in place"
    assert checks["system's ckptd.socket"]["found"] != "missing"
    assert status == 0, "trainers can do without a service"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[Service]\nExecStart=/gone/python -P -m ckptd.daemon\n", "runs /gone/python, which is not there"),
        ("[Service]\nExecStart=/usr/bin/false -P -m ckptd.daemon\n", "which has no ckptd"),
        ("[Service\nExecStart=/usr/bin/false\n", "systemd cannot use it (error)"),
    ],
)
def test_a_wrong_unit_is_named(service, text, found):
    service.write(UNIT, text)
    service.run("systemctl", "daemon-reload")
    status, checks = doctor(service)
    assert status == 1
    assert checks["system's ckptd.service"]["verdict"] == "fail"
    assert found in checks["system's ckptd.service"]["found"]
    assert UNIT in checks["system's ckptd.service"]["found"]
    assert checks["system's ckptd.service"]["remedy"] == "`ckptd install` writes it anew"


def test_a_service_that_does_not_come_up_is_named_with_its_cause(service):
    service.write(CONFIG, "write_threads = 0\n")
    service.run("systemctl", "start", "--no-block", "ckptd.service")
    service.wait_show("NRestarts", lambda value: int(value) >= 1)
    status, checks = doctor(service)
    assert status == 1
    assert checks["configuration"]["found"].startswith(f"{CONFIG}: write_threads: ")
    assert checks["system's ckptd.service"]["verdict"] == "fail"
    assert checks["system's ckptd.service"]["remedy"] == "see `systemctl status ckptd.service`"


def test_a_service_that_is_not_started_or_not_for_the_next_start_is_a_warning(service):
    _, checks = doctor(service)
    assert checks["system's ckptd.service"]["verdict"] == "warn"
    assert checks["system's ckptd.service"]["remedy"] == "`systemctl enable --now ckptd.service`"
    service.run("systemctl", "start", "ckptd.service")
    _, checks = doctor(service)
    assert checks["system's ckptd.service"]["remedy"].startswith("`systemctl enable ckptd.service`")
