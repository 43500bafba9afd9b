"""Makes workers of a daemon under test die at a chosen point: a ``sitecustomize`` on their module path sees to it."""

from __future__ import annotations

from pathlib import Path

_SITE = """
import os, sys

if "ckptd.daemon.workers.worker" in sys.orig_argv:
    import ckptd.checkpoint.publishing.commit as commit
    import ckptd.checkpoint.folder.removal as removal
    import ckptd.checkpoint.image.write as write

    def die():
        for number in range({times}):
            try:
                os.close(os.open(f"{directory}/died-{{number}}", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            os.kill(os.getpid(), 9)

    def around(module, name, *, before):
        original = getattr(module, name)

        def replacement(*args, **kwargs):
            if before:
                die()
            result = original(*args, **kwargs)
            if not before:
                die()
            return result

        setattr(module, name, replacement)

    module, name, before = {{
        "before_publish": (commit, "publish", True),
        "after_exchange": (commit, "rename_exchange", False),
        "after_publish": (commit, "publish", False),
        "before_removal": (removal, "_remove_files", True),
        "before_write": (write, "write_image", True),
        "before_sync": (commit, "sync_directory", True),
    }}["{moment}"]
    around(module, name, before=before)
"""


def sabotage(directory, moment, *, times):
    """Return the environment of a daemon whose workers die at ``moment``, the first ``times`` times.

    Args:
        directory: Where the module and the marks of the dead are kept.
        moment: before_write, before_sync, before_publish, after_exchange (of an overwriting save), after_publish or
            before_removal (of the files of a checkpoint whose name is gone).
        times: After so many deaths all is well.
    """
    place = Path(directory, f"sabotage-{moment}")
    place.mkdir()
    (place / "sitecustomize.py").write_text(_SITE.format(times=times, directory=place, moment=moment))
    return {"PYTHONPATH": str(place)}
