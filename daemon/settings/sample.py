"""The sample configuration, made from :mod:`ckptd.daemon.settings.config`: every setting, its meaning, its default.

``python -m ckptd.daemon.settings.sample > systemd/ckptd.toml`` writes the one that is shipped.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
import textwrap
from collections.abc import Mapping
from typing import Final

from ckptd.daemon.settings.config import Config
from ckptd.daemon.settings.reload import LIVE

_WIDTH: Final = 100
_HEAD: Final = """\
# ckptd's configuration. Each line below that is commented out is a default; an unknown key is an error.
#
# Read from the file that CKPTD_CONFIG names, else from /etc/ckptd/ckptd.toml by the system's daemon, and from
# ~/.config/ckptd/ckptd.toml by a user's own. After a change: `systemctl reload ckptd`. Settings marked with (restart)
# wait for `systemctl restart ckptd`. A file that cannot be used leaves a running daemon as it is; the log says why.
"""


def sample_config(values: Mapping[str, object] | None = None) -> str:
    """Return the text of a configuration file.

    Args:
        values: Settings that the file makes; the others are shown as comments.
    """
    values, defaults = values or {}, Config()
    parts = [_HEAD]
    for name, meaning in meanings().items():
        text = meaning if name in LIVE else f"{meaning} (restart)"
        lines = textwrap.wrap(" ".join(text.replace("``", "").split()), _WIDTH)
        setting = f"{name} = {_toml(values.get(name, getattr(defaults, name)))}"
        parts.append("\n".join([*(f"# {line}" for line in lines), setting if name in values else f"#{setting}"]) + "\n")
    return "\n".join(parts)


def meanings() -> dict[str, str]:
    """Return what the docstring below each setting says."""
    [tree] = ast.parse(textwrap.dedent(inspect.getsource(Config))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for line, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(below, ast.Expr):
            found[line.target.id] = str(ast.literal_eval(below.value))
    return found


def _toml(value: object) -> str:
    """Return a value as TOML writes it, which for strings, numbers and truth values is JSON's way."""
    return json.dumps(value)


if __name__ == "__main__":
    sys.stdout.write(sample_config())
