"""Debian's Prometheus scrapes a working daemon: every dashboard and every rule finds what it asks for."""

import http.client
import re
import statistics
import time
from pathlib import Path

import pytest
import torch
from support.processes import kill, stopped
from support.prometheus import promtool
from support.waiting import wait_until

from dashboards.panels import DASHBOARDS
from dashboards.prometheus_rules import render_rules
from dashboards.rules import ALERTS, RECORDS

FOLDER = Path(__file__).parents[2] / "dashboards" / "prometheus"
RULES = FOLDER / "ckptd-rules.yml"
TOKEN = "correct-horse-battery"


def address(daemon):
    return Path(daemon.runtime.path, "http").read_text().strip()


def filled_in(expression, instance):
    """Put in what Grafana would for its variables."""
    values = {"$job": "ckptd", "$instance": re.escape(instance).replace("\\", "\\\\"), "$window": "1h"}
    for name, value in {**values, "$__rate_interval": "1m"}.items():
        expression = expression.replace(name, value)
    assert "$" not in expression
    return expression


def save_often(trainers, tmp_path, *, ranks=2, times=4):
    job = trainers.job(ranks, name="job")
    for number in range(times):
        job.do("dcp.save(state(value=rank), checkpoint_id=path)", path=str(tmp_path / f"step-{number}"))
    return job


def test_every_expression_of_dashboards_and_rules_has_data(daemon, trainers, prometheus, tmp_path):
    server = prometheus([address(daemon)], RULES)
    server.wait_for('ckptd_saves_total{outcome="committed"} == 0')
    job = save_often(trainers, tmp_path)
    server.wait_for('ckptd_saves_total{outcome="committed"} == 4')
    expressions = [query.expr for board in DASHBOARDS for panel in board.panels for query in panel.queries]
    expressions += [record.name for record in RECORDS] + [record.expr for record in RECORDS]
    expressions += [alert.value for alert in ALERTS]
    assert len(expressions) > 70
    for expression in expressions:
        server.wait_for(filled_in(expression, address(daemon)))
    groups = server.ask("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) == len(RECORDS) + len(ALERTS)
    assert {rule["name"]: rule.get("lastError") for rule in rules if rule["health"] != "ok"} == {}
    assert server.values('ALERTS{alertstate="firing"}') == {}
    assert job.get("session.live") == [True, True]


def test_what_happens_is_what_prometheus_says(start_daemon, trainers, prometheus, tmp_path):
    daemon = start_daemon(http_token_file=token_file(tmp_path))
    server = prometheus([address(daemon)], RULES, token=TOKEN)
    server.wait_for("up == 1")
    assert server.values("ckptd_last_commit_timestamp_seconds") == {}
    job = save_often(trainers, tmp_path, times=2)
    job.do("outcome(dcp.async_save(state(), checkpoint_id='/dev/full/step-9'))")
    workers = [pid for pid in processes(daemon) if pid != daemon.pid]
    kill(workers[0])
    job.do("dcp.save(state(value=rank), checkpoint_id=path)", path=str(tmp_path / "last"))
    job.do("dcp.save(state(value=rank), checkpoint_id=path)", path=str(tmp_path / "really last"))
    for expected in (
        'ckptd_saves_total{outcome="committed"} == 4',
        'ckptd_failures_total{kind="storage"} == 1',
        "ckptd_worker_restarts_total >= 1",
        "ckptd_work_retries_total >= 1",
        "ckptd_slowest_rank_seconds_count == 4",
        "ckptd_save_interval_seconds_count == 3",
        "ckptd_sessions == 2",
        "ckptd_last_commit_age_seconds < 60",
        "abs(ckptd_last_commit_timestamp_seconds - time()) < 60",
        'ckptd_resident_bytes{role="worker", kind="private"} > 1e6',
        'ckptd_cpu_seconds_total{role="worker"} > 0',
        'ckptd_volume_free_bytes{volume="checkpoints"} > 0',
        "ckptd_write_peak_bytes_per_second >= ckptd_write_bytes_per_second",
        'ALERTS{alertname="CkptdSaveFailed", alertstate="firing"}',
        'ALERTS{alertname="CkptdWorkerRestarting", alertstate="firing"}',
    ):
        server.wait_for(expected)
    daemon.kill()
    server.wait_for('ALERTS{alertname="CkptdDown"}')


def processes(daemon):
    return [daemon.pid, *workers_of(daemon)]


def workers_of(daemon):
    connection = http.client.HTTPConnection(address(daemon), timeout=20)
    connection.request("GET", "/status", headers={"Authorization": f"Bearer {TOKEN}"})
    body = connection.getresponse().read().decode()
    connection.close()
    return [int(pid) for pid in re.search(r'"workers":\[([\d,]+)\]', body)[1].split(",")]


def token_file(tmp_path):
    path = tmp_path / "http-token"
    path.write_text(TOKEN)
    return str(path)


def test_an_exemplar_leads_from_a_slow_save_to_its_generation(daemon, trainers, prometheus, tmp_path):
    server = prometheus([address(daemon)], RULES)
    server.wait_for("up == 1")
    save_often(trainers, tmp_path, times=2)
    saves = {save["save_id"] for save in daemon.generations()}

    def exemplars(metric):
        found = server.ask("query_exemplars", query=metric, start=time.time() - 600, end=time.time() + 60)
        return {exemplar["labels"]["save_id"] for one in found for exemplar in one["exemplars"]}

    for metric in ("ckptd_save_seconds_bucket", "ckptd_phase_seconds_bucket", "ckptd_slowest_rank_seconds_bucket"):
        assert wait_until(lambda metric=metric: exemplars(metric), f"exemplars of {metric}") <= saves


def test_a_scrape_beside_a_save_of_1000_items_takes_less_than_20_ms(start_daemon, client, tmp_path, record_property):
    daemon = start_daemon()
    items = {f"w{number}": torch.full((64,), float(number)) for number in range(1000)}
    client.save(items, checkpoint_id=tmp_path / "first")
    with stopped(*daemon.workers()):
        future = client.async_save(items, checkpoint_id=tmp_path / "second")
        daemon.wait_for_save(tmp_path / "second", lambda save: save["state"] == "staged")
        assert daemon.metric("ckptd_saves_in_progress") == 1
        took_s = [scrape(daemon) for _ in range(25)]
    future.result(30)
    median_s = statistics.median(took_s)
    record_property("scrape_ms", round(1000 * median_s, 1))
    print(f"a scrape takes {1000 * median_s:.1f} ms (median), {1000 * max(took_s):.1f} ms (longest)")
    assert median_s < 0.020


def scrape(daemon):
    connection = http.client.HTTPConnection(address(daemon), timeout=20)
    connection.connect()
    begun = time.perf_counter()
    connection.request("GET", "/metrics", headers={"Accept": "application/openmetrics-text;version=1.0.0"})
    body = connection.getresponse().read()
    took_s = time.perf_counter() - begun
    connection.close()
    assert body.endswith(b"# EOF\n")
    return took_s


def test_promtool_finds_nothing_to_say_about_the_metrics(daemon, trainers, tmp_path):
    save_often(trainers, tmp_path, times=2)
    lint = promtool("check", "metrics", given=daemon.get("/metrics")[1])
    assert (lint.returncode, lint.stdout + lint.stderr) == (0, "")


def test_the_rules_are_good_and_their_tests_pass():
    checked = promtool("check", "rules", RULES)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    tested = promtool("test", "rules", FOLDER / "ckptd-rules.test.yml")
    assert tested.returncode == 0, tested.stdout + tested.stderr


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_an_alert_that_never_fires_is_found(tmp_path, alert):
    spoiled = render_rules().replace(f"alert: '{alert.name}'", f"alert: '{alert.name}Not'")
    (tmp_path / RULES.name).write_text(spoiled)
    tests = FOLDER / "ckptd-rules.test.yml"
    (tmp_path / tests.name).write_text(tests.read_text())
    assert promtool("test", "rules", tmp_path / tests.name).returncode != 0
