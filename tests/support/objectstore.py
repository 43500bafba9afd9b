"""An S3 store of the test's own: moto's server on the loopback, with keys that open nothing else."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from moto.server import ThreadedMotoServer

KEYS = {
    "AWS_ACCESS_KEY_ID": "of-this-test-only",
    "AWS_SECRET_ACCESS_KEY": "of-this-test-only",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Run a server on a port of its own; yield its address."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


class Bucket:
    """One bucket, looked at past the code under test.

    Attributes:
        name: Its name.
        url: Its URL, without a slash at the end.
    """

    def __init__(self, fs: object, name: str) -> None:
        self.fs, self.name, self.url = fs, name, f"s3://{name}"

    def objects(self) -> list[str]:
        """Return the keys of all objects."""
        found = self.fs.call_s3("list_objects_v2", Bucket=self.name)
        return sorted(entry["Key"] for entry in found.get("Contents", []))

    def uploads(self) -> list[str]:
        """Return the keys of multipart uploads that were begun and neither completed nor aborted."""
        found = self.fs.call_s3("list_multipart_uploads", Bucket=self.name)
        return sorted(entry["Key"] for entry in found.get("Uploads", []))

    def etag(self, key: str) -> str:
        """Return an object's tag; one that came in parts ends with their number."""
        return self.fs.call_s3("head_object", Bucket=self.name, Key=key)["ETag"].strip('"')


class Wire:
    """Stands between s3fs and its store: counts calls, and lets some of them fail or arrive changed."""

    def __init__(self, monkeypatch, kind: type) -> None:
        self.calls: list[tuple[str, str]] = []
        self.most_at_a_time: dict[str, int] = {}
        self._under_way: dict[str, int] = {}
        self._lock = threading.Lock()
        self._before: list[Callable[[str, dict[str, object]], None]] = []
        original = kind.call_s3
        wire = self

        def call_s3(fs, method, *args, **fields):
            with wire._lock:
                wire.calls.append((method, str(fields.get("Key"))))
                wire._under_way[method] = wire._under_way.get(method, 0) + 1
                wire.most_at_a_time[method] = max(wire.most_at_a_time.get(method, 0), wire._under_way[method])
            try:
                for hook in wire._before:
                    hook(method, fields)
                return original(fs, method, *args, **fields)
            finally:
                with wire._lock:
                    wire._under_way[method] -= 1

        monkeypatch.setattr(kind, "call_s3", call_s3)

    def before(self, hook: Callable[[str, dict[str, object]], None]) -> None:
        """Call ``hook`` with the name and the fields of each call; it may change them, or raise."""
        self._before.append(hook)

    def fail(self, method: str, *, times: int, ending: str = "", error: Exception | None = None) -> None:
        """Let the next calls of a method, about keys with this ending, fail."""
        left = [times]

        def hook(called: str, fields: dict[str, object]) -> None:
            if called == method and str(fields.get("Key", "")).endswith(ending) and left[0]:
                left[0] -= 1
                raise error or OSError("the store is busy")

        self._before.append(hook)

    def count(self, method: str) -> int:
        """Return how often a method was called."""
        return sum(called == method for called, _ in self.calls)
