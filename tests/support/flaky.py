"""Makes the workers of a daemon under test fail with errors that pass: a ``sitecustomize`` on their path sees to it."""

from __future__ import annotations

from pathlib import Path

_SITE = """
import os, sys

if "ckptd.daemon.workers.worker" in sys.orig_argv:
    import ckptd.checkpoint.image.write as write
    from ckptd.protocol.errors import SystemCallFailed

    original = write.write_image

    def write_image(path, *args, **kwargs):
        for number in range({times}):
            try:
                os.close(os.open(f"{directory}/failed-{{number}}", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            with open(path, "wb") as half:
                half.write(b"half")
            raise SystemCallFailed("pwrite", path, {errno})
        return original(path, *args, **kwargs)

    write.write_image = write_image
"""


def flaky(directory, errno, *, times):
    """Return the environment of a daemon whose workers fail to write the first ``times`` times.

    Args:
        directory: Where the module and the marks of the failures are kept.
        errno: What the write says.
        times: After so many failures all is well.
    """
    place = Path(directory, "flaky")
    place.mkdir()
    (place / "sitecustomize.py").write_text(_SITE.format(times=times, directory=place, errno=errno))
    return {"PYTHONPATH": str(place)}


def failures(directory):
    """Return how often a worker has failed so far."""
    return len(list(Path(directory, "flaky").glob("failed-*")))
