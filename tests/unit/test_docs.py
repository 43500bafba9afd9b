"""What the documents name exists, and what exists is named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ckptd.daemon.cli.app import app
from ckptd.daemon.monitoring.metrics import Live, Metrics
from ckptd.daemon.settings.config import Config
from ckptd.daemon.systemd.units import shipped
from ckptd.protocol import messages

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted([*DOCS.glob("*.md"), DOCS.parent / "README.md"])


def page(name):
    return (DOCS / name).read_text(encoding="utf-8")


def in_code(text):
    """Return every word of the text that stands in backticks or in a block of code."""
    spans = re.findall(r"```.*?```|`[^`]+`", text, re.DOTALL)
    return set(re.findall(r"[\w.-]+", " ".join(spans)))


def sections(text):
    """Return the text below each heading of the second level."""
    return dict(part.split("\n", 1) for part in text.split("\n## ")[1:])


def test_every_message_is_named_in_its_conversation():
    text = page("protocol.md")
    named = in_code(text)
    assert {message.__name__ for message in messages.Message.__subclasses__()} <= named
    conversations = {
        "Attach socket": messages.AttachRequest | messages.AttachReply,
        "Message socket": messages.ClientMessage | messages.DaemonMessage,
        "Worker socket": messages.Task | messages.TaskReply,
    }
    for title, union in conversations.items():
        assert {message.__name__ for message in union.__args__} <= in_code(sections(text)[title]), title


def test_the_protocols_version_is_the_one_in_force():
    assert f"version {messages.PROTOCOL_VERSION}." in page("protocol.md")


def test_every_setting_is_explained_in_tuning():
    assert set(Config.__struct_fields__) <= in_code(page("tuning.md"))


def test_defaults_that_tuning_names_are_true():
    shown = dict(re.findall(r"`(\w+)` \((\d+)\)", page("tuning.md")))
    assert len(shown) >= 6
    for name, value in shown.items():
        assert getattr(Config(), name) == float(value), name
    weights = dict(re.findall(r"`(CPUWeight|IOWeight)=(\d+)`", page("tuning.md")))
    assert all(f"{name}={value}\n" in shipped("ckptd.slice") for name, value in weights.items())


def test_every_command_is_in_some_page():
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    for command in app.registered_commands:
        assert f"ckptd {command.callback.__name__}" in text


def test_the_runbooks_metrics_exist():
    exposed = Metrics(lambda: Live({}, 0, 0, 0, 0)).render().decode()
    series = set(re.findall(r"^# TYPE (\S+)", exposed, re.MULTILINE)) | set(
        re.findall(r"^(\w+)", exposed, re.MULTILINE)
    )
    families = series | {"ckptd_last_commit_age_seconds"}
    for name in ("operations.md", "tuning.md"):
        used = set(re.findall(r"\bckptd_[a-z_]+", page(name)))
        assert used
        assert used <= families, used - families


def test_each_alert_has_a_meaning_a_check_and_a_cure():
    alerts = sections(page("operations.md"))["Runbook"].split("\n### ")[1:]
    assert [alert.split("\n")[0] for alert in alerts] == [
        "No commit for N intervals",
        "Failing saves",
        "Slots exhausted",
        "Disk nearly full",
        "Worker restarting",
        "Stall too high",
        "Daemon down",
    ]
    rules = (DOCS.parent / "dashboards" / "prometheus" / "ckptd-rules.yml").read_text(encoding="utf-8")
    for alert in alerts:
        named = re.findall(r"`(Ckptd\w+)`", alert)
        assert named
        assert all(f"alert: '{name}'" in rules for name in named)
        assert [word for word in ("**Meaning.**", "**Check.**", "**Cure.**") if alert.count(word) != 1] == []


def test_every_capability_that_the_unit_keeps_is_explained():
    [kept] = re.findall(r"^CapabilityBoundingSet=(.+)$", shipped("ckptd.service"), re.MULTILINE)
    assert {word for word in in_code(page("security.md")) if word.startswith("CAP_")} == set(kept.split())


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_and_files_are_there(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)", text):
        if "://" not in target:
            assert (path.parent / target).exists(), target
    for file in re.findall(r"`((?:tests|protocol|daemon|client|checkpoint|systemd)/[\w/.-]+\.\w+)`", text):
        assert (DOCS.parent / file).exists(), file
