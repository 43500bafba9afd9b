"""A host with a real systemd, and users of its own, for the tests of the service; see systemd-host.sh."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from support.mounts import need_root, unavailable
from support.trainers import Nursery
from support.waiting import PATIENCE_S, wait_until

ALICE, BOB = 4001, 4002
CKPTD = str(Path(sys.executable).with_name("ckptd"))
CONFIG = "/etc/ckptd/ckptd.toml"
# Faster than the defaults, slower than a busy machine's hiccups. The host shares this machine's ports.
SETTINGS = {"http": "127.0.0.1:0", "heartbeat_s": 0.2, "worker_nice": 0}
_SCRIPT = str(Path(__file__).with_name("systemd-host.sh"))
_TREES = [str(Path(__file__).parents[2]), sys.prefix, str(Path(sys.base_prefix).resolve())]


class Host:
    """A running host. What is written in it is gone when it is halted."""

    def __init__(self, directory):
        self._directory = directory
        boot = [_SCRIPT, "boot", directory, *_TREES]
        booted = subprocess.run(boot, check=False, capture_output=True, text=True, timeout=90)
        if booted.returncode:
            unavailable(f"no systemd in namespaces here: {booted.stderr.strip()[-500:]}")
        pid = Path(directory, "pid").read_text().strip()
        # --wd without a directory is the host's own: one of ours would lie outside its root.
        self.prefix = ["nsenter", "--target", pid, "--mount", "--uts", "--ipc", "--pid", "--cgroup", "--root", "--wd"]
        self._open_the_interpreter()
        for name, uid in (("alice", ALICE), ("bob", BOB)):
            self.run("useradd", "--create-home", "--uid", str(uid), "--user-group", name)
            self.run("chmod", "700", f"/home/{name}")

    def _open_the_interpreter(self):
        """Let the host's users run this interpreter, wherever it lies: workers run as them."""
        above = {str(parent) for tree in _TREES for parent in [Path(tree), *Path(tree).parents]} - {"/"}
        closed = [path for path in sorted(above) if not os.stat(path).st_mode & 0o001]
        if closed:
            self.run("chmod", "o+x", *closed)

    def call(self, *command, uid=0, environment=None):
        """Run a command and return what came of it."""
        who = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--"] if uid else []
        return subprocess.run(
            [*self.prefix, "--", *who, *command],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=90,
            cwd="/",
            env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "HOME": "/root", **(environment or {})},
        )

    def run(self, *command, **options):
        """Run a command that must succeed; return what it printed."""
        done = self.call(*command, **options)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def write(self, path, text):
        """Write a file."""
        subprocess.run(
            [*self.prefix, "--", "sh", "-c", 'mkdir -p "$(dirname "$0")" && cat >"$0"', path],
            input=text,
            text=True,
            check=True,
            timeout=30,
        )

    def read(self, path):
        """Return what a file holds."""
        return self.run("cat", path)

    def show(self, prop, unit="ckptd.service"):
        """Return a property of a unit."""
        return self.run("systemctl", "show", "--value", "-p", prop, unit).strip()

    def wait_show(self, prop, predicate, unit="ckptd.service", *, timeout_s=PATIENCE_S):
        """Wait until a property of a unit is as wanted."""

        def found():
            value = self.show(prop, unit)
            return value if predicate(value) else None

        return wait_until(found, f"{prop} of {unit} as wanted", timeout_s=timeout_s)

    def configure(self, **settings):
        """Write the service's configuration."""
        lines = [f"{name} = {json.dumps(value)}" for name, value in {**SETTINGS, **settings}.items()]
        self.write(CONFIG, "\n".join(lines) + "\n")

    def drop_in(self, unit, text):
        """Change a unit until the test's end."""
        self.write(f"/run/systemd/system/{unit}.d/test.conf", text)
        self.run("systemctl", "daemon-reload")

    def ckptd(self, *arguments, **options):
        """Run the command line."""
        return self.call(CKPTD, *arguments, **options)

    def status(self):
        """Return what ``ckptd status --json`` prints."""
        return json.loads(self.run(CKPTD, "status", "--json"))

    def journal(self, priority="debug"):
        """Return the service's log since it was last emptied, from a priority on."""
        return self.run("journalctl", "--no-pager", "-o", "cat", "-u", "ckptd.service", "-p", priority)

    def close(self):
        """Halt it."""
        subprocess.run([_SCRIPT, "halt", self._directory], check=True, timeout=30)


@pytest.fixture(scope="session")
def host():
    """The host of all tests of the service; each of them leaves it without units of ours."""
    need_root("a host of its own")
    missing = [tool for tool in ("nsenter", "unshare", "setpriv", "useradd") if shutil.which(tool) is None]
    if missing or not Path("/lib/systemd/systemd").exists():
        unavailable(f"needs systemd and {missing}; see `make system-packages`")
    host = Host(tempfile.mkdtemp(prefix="ckhost", dir="/var/tmp"))
    yield host
    host.close()


@pytest.fixture(scope="session")
def host_nursery(host):
    """Where the host's trainers are forked."""
    nursery = Nursery([*host.prefix, "--"])
    yield nursery
    nursery.close()


@pytest.fixture
def service(host):
    """The host with ckptd installed, not started; at the end all of it is gone again."""
    host.configure()
    host.run(CKPTD, "install")
    yield host
    log = host.journal()
    print(log)
    host.run("rm", "-rf", "/run/systemd/system/ckptd.service.d", "/run/systemd/system/ckptd.socket.d")
    host.run("systemctl", "daemon-reload")
    host.call("systemctl", "kill", "--signal=KILL", "ckptd.service")
    host.run(CKPTD, "uninstall")
    host.call("systemctl", "reset-failed")
    host.run("journalctl", "--rotate", "--vacuum-size=1K", "--quiet")
    host.run("sh", "-c", "rm -rf /dev/shm/ckptd-* /var/lib/ckptd")
    assert "Traceback" not in log


@pytest.fixture
def users(service, host_nursery):
    """Start trainers in the host: ``users(uid)``."""
    started = []

    def start(uid, **environment):
        log = f"/tmp/trainer-{uid}-{len(started)}.log"
        variables = {"CKPTD_EMBEDDED": "0", "HOME": f"/tmp/{uid}", **environment}
        without = ["CKPTD_RUNTIME_DIR", "CKPTD_STATE_DIR", "CKPTD_CONFIG", "XDG_RUNTIME_DIR"]
        trainer = host_nursery.trainer(environment=variables, log=log, uid=uid, without=without)
        started.append(trainer)
        return trainer

    yield start
    for trainer in started:
        trainer.say_goodbye()
