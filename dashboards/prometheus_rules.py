"""Turns the lists of rules into a rule file of Prometheus."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from dashboards.rules import ALERTS, RECORDS, Alert, Record

_HEAD: Final = "# Made by `python -m dashboards` from dashboards/rules.py. What each alert means: docs/monitoring.md\n"
_HELP: Final = "docs/monitoring.md#"


def render_rules() -> str:
    """Return the rule file: YAML with every value in single quotes, in which only they mean something."""
    lines = [_HEAD + "groups:"]
    lines += _group("ckptd-records", map(_record, RECORDS))
    lines += _group("ckptd-alerts", map(_alert, ALERTS))
    return "\n".join(lines) + "\n"


def _group(name: str, rules: Iterable[Mapping[str, object]]) -> Iterable[str]:
    yield f"  - name: {name}"
    yield "    rules:"
    for rule in rules:
        begin = "      - "
        for key, value in rule.items():
            if isinstance(value, Mapping):
                yield f"{begin}{key}:"
                yield from (f"          {inner}: {_quoted(text)}" for inner, text in value.items())
            else:
                yield f"{begin}{key}: {_quoted(value)}"
            begin = "        "


def _record(rule: Record) -> Mapping[str, object]:
    return {"record": rule.name, "expr": rule.expr}


def _alert(rule: Alert) -> Mapping[str, object]:
    return {
        "alert": rule.name,
        "expr": rule.expr,
        "for": rule.hold,
        "labels": {"severity": rule.severity},
        "annotations": {"summary": rule.summary, "runbook": _HELP + rule.name.lower()},
    }


def _quoted(value: object) -> str:
    return "'" + str(value).replace("'", "''") + "'"
