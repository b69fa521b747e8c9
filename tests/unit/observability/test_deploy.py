"""Dashboards and rules ask only for metrics that the real exposition has."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.unit.observability.test_metrics import filled

DEPLOY = Path(__file__).parents[3] / "deploy"
NAMES = re.compile(r"\b(?:forebay|process)_[a-z0-9_]+\b")
LABELS = re.compile(r"by \(([^)]*)\)")


def exposed() -> dict[str, set[str]]:
    """Labels by sample name."""
    out: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(filled().exposition().decode()):
        for s in family.samples:
            out.setdefault(s.name, set()).update(s.labels)
    return out


def expressions() -> list[str]:
    found = []
    for file in (DEPLOY / "grafana").glob("*.json"):
        board = json.loads(file.read_text())
        found += [t["expr"] for p in board["panels"] for t in p["targets"]]
        found += [v["query"] for v in board["templating"]["list"] if v["type"] == "query"]
    for file in (DEPLOY / "prometheus").glob("*.yml"):
        for group in yaml.safe_load(file.read_text())["groups"]:
            found += [r["expr"] for r in group["rules"]]
    return found


def test_every_expression_asks_for_what_is_exposed() -> None:
    have = exposed()
    wanted = expressions()
    assert len(wanted) > 15
    for expression in wanted:
        names = NAMES.findall(expression)
        for name in names:
            assert name in have, f"{name} of {expression!r} is not exposed"
        labels = {x.strip() for group in LABELS.findall(expression) for x in group.split(",")}
        for name in names:
            assert labels <= have[name] | {"le"}, (expression, labels - have[name])
