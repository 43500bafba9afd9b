"""The files that operators import are what the lists in Python say, and speak only of metrics that there are."""

import copy
import json
import re
from pathlib import Path

import pytest
from support.grafana import faults

from ckptd.daemon.monitoring.labels import Role
from ckptd.daemon.monitoring.metrics import Live, Metrics
from ckptd.daemon.monitoring.usage import Usage
from ckptd.daemon.monitoring.volumes import Room
from dashboards.__main__ import files
from dashboards.grafana import render
from dashboards.panels import DASHBOARDS
from dashboards.rules import ALERTS, RECORDS

ROOT = Path(__file__).parents[2]
METRIC = re.compile(r"\b(?:[a-z_]+:)?ckptd_\w+(?::\w+)?")

boards = pytest.mark.parametrize("board", DASHBOARDS, ids=lambda board: board.uid)


def series():
    """Return the names of all series of a daemon that has done everything once, and of the recording rules."""
    usage = dict.fromkeys(Role.__args__, Usage())
    rooms = {"shm": Room(1, 1), "checkpoints": Room(1, 1)}
    live = Live(
        {}, queue_depth=0, sessions=0, workers=0, arena_bytes=0, lateness=1, usage=usage, rooms=rooms, memory=(1, 1)
    )
    metrics = Metrics(lambda: live)
    metrics.committed(1, 1, now=1)
    metrics.save_written(1)
    names = {re.split(r"[ {]", line)[0] for line in metrics.render().decode().splitlines() if line[0] != "#"}
    return names | {record.name for record in RECORDS}


@pytest.mark.parametrize("path", files(), ids=lambda path: path.name)
def test_the_committed_file_is_the_one_that_is_made(path):
    assert path.read_text() == files()[path], "run `make dashboards`"


@boards
def test_grafanas_schema_allows_it(board):
    assert faults(render(board)) == []


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (("schemaVersion",), "36"),
        (("graphTooltip",), 7),
        (("panels", 0, "gridPos", "w"), "wide"),
        (("panels", 0, "fieldConfig", "defaults", "thresholds", "mode"), "vague"),
        (("panels", 0, "fieldConfig", "defaults", "colour"), {}),
        (("panels", 7, "fieldConfig", "defaults", "custom", "drawStyle"), "crayon"),
        (("panels", 7, "options", "legend", "placement"), "above"),
        (("panels", 7, "targets", 0, "expression"), "up"),
        (("templating", "list", 0, "hide"), "yes"),
    ],
)
def test_what_the_schema_does_not_allow_is_found(at, value):
    board = copy.deepcopy(render(DASHBOARDS[0]))
    inner = board
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = value
    assert faults(board)


@boards
def test_panels_tile_the_page_and_have_numbers_of_their_own(board):
    panels = render(board)["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + dx, place["y"] + dy) for dx in range(place["w"]) for dy in range(place["h"])}
        assert not cells & taken
        taken |= cells
    assert len({target["refId"] for target in panels[-1]["targets"]}) == len(panels[-1]["targets"])


@boards
def test_it_begins_with_what_an_operator_asks_first(board):
    titles = " ".join(panel.title.lower() for panel in board.panels)
    for word in ("stall", "last commit", "limit", "spend their time", "slowest rank", "slots", "fail"):
        assert word in titles


def expressions():
    yield from (query.expr for board in DASHBOARDS for panel in board.panels for query in panel.queries)
    yield from (rule.expr for rule in (*RECORDS, *ALERTS))


def test_only_metrics_that_there_are_are_asked_for():
    known, asked = series(), {name for expr in expressions() for name in METRIC.findall(expr)}
    assert len(asked) > 30
    assert asked <= known


def test_every_gauge_and_counter_is_shown_or_watched_somewhere():
    asked = " ".join(expressions())
    unseen = {
        name for name in series() if not re.search(rf"\b{name}", asked) and not name.endswith(("_bucket", "_count"))
    }
    assert unseen == {
        # shown by the daemon's page, and asked for by dashboards through label_values
        *("ckptd_build_info", "ckptd_start_time_seconds"),
        # told by others in more useful form: rates of writing, sums over histograms
        *("ckptd_staged_bytes_total", "ckptd_committed_bytes_total", "ckptd_node_cache_served_bytes_total"),
        *("ckptd_save_seconds_sum", "ckptd_save_interval_seconds_sum", "ckptd_slowest_rank_seconds_sum"),
        *(record.name for record in RECORDS if record.name not in asked),
    }


def test_every_alert_has_a_section_that_says_what_to_do():
    sections = re.findall(r"^### (\w+)$", (ROOT / "docs" / "monitoring.md").read_text(), re.MULTILINE)
    assert sections == [alert.name for alert in ALERTS]


@pytest.mark.parametrize("rule", RECORDS, ids=lambda rule: rule.name)
def test_a_recorded_name_says_level_metric_and_operation(rule):
    level, metric, operation = rule.name.split(":")
    assert level in {"instance", "instance_phase"}
    assert metric in rule.expr
    assert operation


def test_a_dashboard_is_plain_json_without_a_place_of_its_own():
    for path, text in files().items():
        if path.suffix == ".json":
            assert "id" not in json.loads(text)
            assert json.loads(text)["uid"].startswith("ckptd-")
