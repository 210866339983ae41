"""Every expression of the dashboard and of the alerts is of metrics that there are, with labels that they have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayk.metrics.table import METRICS

SUFFIXES = ("_bucket", "_sum", "_count")


@pytest.fixture
def folder(repo: Path) -> Path:
    return repo / "examples/observability"


def expressions(folder: Path) -> Iterator[tuple[str, str]]:
    """With where each stands."""
    board = json.loads((folder / "grafana/dashboards/rayk.json").read_text())
    for panel in board["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"].replace("${prefix}", "ray_")
    for group in yaml.safe_load((folder / "alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


def metric_of(name: str) -> Any:
    """The metric of a name that Ray shows; KeyError when there is none."""
    plain = name.removeprefix("ray_")
    if plain in METRICS:
        assert METRICS[plain].kind != "histogram", f"{name} has buckets, a sum and a count"
        return METRICS[plain]
    [suffix] = [each for each in SUFFIXES if plain.endswith(each)] or [""]
    metric = METRICS[plain.removesuffix(suffix)]
    assert metric.kind == "histogram", name
    return metric


def test_expressions_are_of_what_there_is(folder: Path) -> None:
    seen = set()
    for where, expression in expressions(folder):
        names = re.findall(r"\bray_rayk_\w+", expression)
        assert names and len(re.findall(r"rayk_\w+", expression)) == len(names), where
        allowed = {"le"}
        for name in names:
            metric = metric_of(name)
            allowed |= set(metric.labels)
            seen.add(metric.name)
            for call in re.findall(rf"(\w+)\({name}\b", expression):
                counts = metric.kind in ("counter", "histogram")
                assert (call in ("rate", "increase")) == counts, f"{where}: {call} of a {metric.kind}, {name}"
            for matcher in re.findall(rf"{name}{{([^}}]*)}}", expression):
                labels = {label for label, _ in re.findall(r"(\w+)(=~|=)\"", matcher)}
                assert labels <= set(metric.labels), f"{where}: {name} has no {labels - set(metric.labels)}"
        for grouping in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression):
            assert set(re.findall(r"\w+", grouping)) <= allowed, where
        assert expression.count("(") == expression.count(")"), where
    missing = {"rayk_pages", "rayk_prefix_tokens_hit_total", "rayk_ttft_seconds", "rayk_replica_state"} - seen
    assert not missing


def test_the_dashboard_can_be_provisioned(folder: Path) -> None:
    board = json.loads((folder / "grafana/dashboards/rayk.json").read_text())
    panels = board["panels"]
    assert len(panels) == 15 and len({panel["id"] for panel in panels}) == 15 and board["uid"] == "rayk"
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == 15 and all(x + 8 <= 24 for x, _ in places), "no panel covers another"
    variables = {each["name"] for each in board["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(panels))) - {"__rate_interval"}
    assert used <= variables == {"datasource", "prefix", "cluster"}
    provider = yaml.safe_load((folder / "grafana/dashboards/rayk.yml").read_text())["providers"][0]
    assert provider["type"] == "file" and yaml.safe_load((folder / "grafana/datasources/prometheus.yml").read_text())


def test_alerts_say_what_is_wrong(folder: Path) -> None:
    [group] = yaml.safe_load((folder / "alerts.yml").read_text())["groups"]
    assert all(rule["labels"]["severity"] and rule["annotations"]["summary"] for rule in group["rules"])
    config = yaml.safe_load((folder / "prometheus.yml").read_text())
    assert config["rule_files"] == ["alerts.yml"] and config["global"]["scrape_interval"] == "15s"
