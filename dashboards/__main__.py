"""``python -m dashboards``, from the root of the repository: writes the files that operators import."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from dashboards.grafana import render
from dashboards.panels import DASHBOARDS
from dashboards.prometheus_rules import render_rules

FOLDER: Final = Path(__file__).resolve().parent


def files() -> Mapping[Path, str]:
    """Return the text of every file that is made here."""
    made = {FOLDER / f"{board.uid}.json": json.dumps(render(board), indent=2) + "\n" for board in DASHBOARDS}
    return {**made, FOLDER / "prometheus" / "ckptd-rules.yml": render_rules()}


def main() -> None:
    """Write them."""
    for path, text in files().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
