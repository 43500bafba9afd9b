"""Debian's Prometheus: a server that scrapes what a test starts, and promtool."""

from __future__ import annotations

import json
import math
import shutil
import socket
import subprocess
import urllib.parse
from pathlib import Path

import pytest
from support.daemons import http_get
from support.mounts import unavailable
from support.waiting import PATIENCE_S, wait_until

_START_S = 60.0


def program(name):
    """Return the path of a program of the package."""
    path = shutil.which(name)
    if path is None:
        unavailable(f"no {name} here; `make system-packages` installs it")
    return path


def promtool(*arguments, given=None):
    """Run promtool and return what it made of it."""
    return subprocess.run(
        [program("promtool"), *map(str, arguments)],
        input=given,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


class Prometheus:
    """A server of its own: folder, port, and a scrape every fraction of a second."""

    def __init__(self, folder, targets, rules, *, token=None):
        self._folder = Path(folder)
        self._folder.mkdir()
        self._write(targets, rules, token)
        self.address = f"127.0.0.1:{_free_port()}"
        self._log = (self._folder / "log").open("wb")
        self._process = subprocess.Popen(
            [
                program("prometheus"),
                f"--config.file={self._folder}/prometheus.yml",
                f"--storage.tsdb.path={self._folder}/data",
                f"--web.listen-address={self.address}",
                "--enable-feature=exemplar-storage",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._log,
        )
        wait_until(self._is_ready, "Prometheus", timeout_s=_START_S)

    def _write(self, targets, rules, token):
        scrape = {"job_name": "ckptd", "static_configs": [{"targets": targets}]}
        if token is not None:
            scrape["authorization"] = {"credentials": token}
        settings = {
            "global": {"scrape_interval": "200ms", "scrape_timeout": "200ms", "evaluation_interval": "200ms"},
            "rule_files": [str(rules)],
            "scrape_configs": [scrape],
        }
        (self._folder / "prometheus.yml").write_text(json.dumps(settings))  # JSON is YAML

    def _is_ready(self):
        assert self._process.poll() is None, (self._folder / "log").read_text()
        try:
            return http_get(self.address, "/-/ready")[0] == 200
        except OSError:
            return False

    def ask(self, path, **parameters):
        """Return the data of a call of its API."""
        status, body = http_get(self.address, f"/api/v1/{path}?{urllib.parse.urlencode(parameters)}")
        assert status == 200, body
        return json.loads(body)["data"]

    def values(self, expression):
        """Return the finite values of an expression, by its labels."""
        found = self.ask("query", query=expression)["result"]
        samples = {tuple(sorted(one["metric"].items())): float(one["value"][1]) for one in found}
        return {labels: value for labels, value in samples.items() if math.isfinite(value)}

    def wait_for(self, expression, *, timeout_s=PATIENCE_S):
        """Wait until an expression has a finite value."""
        wait_until(lambda: self.values(expression), f"data of {expression}", timeout_s=timeout_s)

    def close(self):
        """End it."""
        self._process.terminate()
        self._process.wait(PATIENCE_S)
        self._log.close()


def _free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture
def prometheus(tmp_path_factory):
    """Start Prometheus: ``prometheus([HOST:PORT], rules)``."""
    started = []

    def start(targets, rules, **options):
        started.append(Prometheus(tmp_path_factory.mktemp("prometheus") / "home", targets, rules, **options))
        return started[-1]

    yield start
    for server in started:
        server.close()
