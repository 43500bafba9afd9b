"""Turns the list of panels into what Grafana imports: its dashboard JSON, schema version 36 (Grafana 9 and later)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from dashboards.panels import Dashboard, Panel, Query

_SCHEMA_VERSION: Final = 36
_COLUMNS: Final = 24
_HEIGHTS: Final = {"stat": 4, "timeseries": 8}
_DATASOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}
_WINDOWS: Final = ("15m", "1h", "6h", "1d")
_WINDOW: Final = "1h"


def render(dashboard: Dashboard) -> dict[str, Any]:
    """Return a dashboard as Grafana's JSON."""
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.text,
        "tags": ["ckptd"],
        "schemaVersion": _SCHEMA_VERSION,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": list(_variables(dashboard))},
        "links": [
            {
                "title": "ckptd",
                "type": "dashboards",
                "tags": ["ckptd"],
                "icon": "external link",
                "tooltip": "",
                "asDropdown": False,
                "targetBlank": False,
                "includeVars": True,
                "keepTime": True,
            }
        ],
        "panels": list(_panels(dashboard.panels)),
    }


def _variables(dashboard: Dashboard) -> Iterable[dict[str, Any]]:
    yield {"name": "datasource", "type": "datasource", "label": "Data source", "query": "prometheus", "hide": 0}
    for name, query in dashboard.variables.items():
        yield {
            "name": name,
            "type": "query",
            "label": name,
            "datasource": _DATASOURCE,
            "query": {"query": query, "refId": name},
            "refresh": 2,
            "sort": 1,
            "multi": name != "instance",
            "includeAll": name != "instance",
            "allValue": ".*",
            "hide": 0,
        }
    yield {
        "name": "window",
        "type": "custom",
        "label": "Window",
        "query": ",".join(_WINDOWS),
        "current": {"selected": True, "text": _WINDOW, "value": _WINDOW},
        "options": [{"selected": window == _WINDOW, "text": window, "value": window} for window in _WINDOWS],
        "hide": 0,
    }


def _panels(panels: Iterable[Panel]) -> Iterable[dict[str, Any]]:
    """Place panels from left to right, row after row."""
    x, y, row_height = 0, 0, 0
    for number, panel in enumerate(panels, start=1):
        height = _HEIGHTS[panel.kind]
        if x + panel.width > _COLUMNS:
            x, y, row_height = 0, y + row_height, 0
        yield _panel(panel, number, {"x": x, "y": y, "w": panel.width, "h": height})
        x, row_height = x + panel.width, max(row_height, height)


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": _DATASOURCE,
        "gridPos": place,
        "targets": [_target(query, position) for position, query in enumerate(panel.queries)],
        "fieldConfig": {"defaults": _field(panel), "overrides": []},
        "options": _options(panel),
    }


def _target(query: Query, position: int) -> dict[str, Any]:
    return {
        "refId": chr(ord("A") + position),
        "datasource": _DATASOURCE,
        "expr": query.expr,
        "legendFormat": query.legend or "__auto",
        "editorMode": "code",
        "range": True,
        "exemplar": "_bucket" in query.expr,
    }


def _field(panel: Panel) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": colour, "value": value} for value, colour in panel.steps]
    if not steps or steps[0]["value"] > 0:
        steps.insert(0, {"color": "green", "value": 0})
    steps[0]["value"] = None  # the lowest step has no lower end
    defaults: dict[str, Any] = {
        "unit": panel.unit,
        "min": 0,
        "color": {"mode": "thresholds" if panel.kind == "stat" else "palette-classic"},
        "thresholds": {"mode": "absolute", "steps": steps},
    }
    if panel.kind == "timeseries":
        defaults["custom"] = {
            "drawStyle": "line",
            "lineWidth": 1,
            "fillOpacity": 30 if panel.stacked else 5,
            "showPoints": "never",
            "spanNulls": True,
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
        }
    return defaults


def _options(panel: Panel) -> dict[str, Any]:
    if panel.kind == "stat":
        return {
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "colorMode": "value",
            "graphMode": "area",
            "justifyMode": "auto",
            "textMode": "auto",
            "orientation": "auto",
        }
    return {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
