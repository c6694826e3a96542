"""Every metric that a dashboard or an alert asks for is one that raystill or Ray exports, and each of ours is shown."""

import ast
import functools
import json
import re
from pathlib import Path

import pytest
import ray
import yaml

ROOT = Path(__file__).parents[2]
DASHBOARDS = {
    path.stem: json.loads(path.read_text())
    for path in sorted((ROOT / "infra/monitoring/grafana/dashboards").glob("*.json"))
}
ALERTS = yaml.safe_load((ROOT / "infra/monitoring/alerts.yaml").read_text())
NAME = re.compile(r"\bray_[a-z0-9_]+")
KINDS = {"Counter": ["_total"], "Gauge": [""], "Histogram": ["_bucket", "_sum", "_count"]}


def declared(path):
    """Names and kinds of the metrics that a Python file makes."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in KINDS:
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value, node.func.attr


@functools.cache
def ours():
    """Exported names of raystill's metrics, by the name that the code gives them."""
    files = [path for room in ("cluster", "services", "jobs") for path in (ROOT / room).rglob("*.py")]
    return {name: [f"ray_{name}{ending}" for ending in KINDS[kind]] for path in files for name, kind in declared(path)}


def of_ray():
    """Names that Ray's own dashboards use, and those of Serve's metrics."""
    installed = Path(ray.__file__).parent
    text = "".join(path.read_text() for path in (installed / "dashboard/modules/metrics/dashboards").glob("*.py"))
    found = set(re.findall(r"ray_[a-z0-9_]+", text))
    for path in (installed / "serve").rglob("*.py"):
        if "metrics." not in path.read_text(encoding="utf-8"):
            continue
        found |= {f"ray_{name}{ending}" for name, kind in declared(path) for ending in KINDS[kind]}
    return found


def panels():
    return [
        (f"{name}: {panel['title']}", target["expr"])
        for name, board in DASHBOARDS.items()
        for panel in board["panels"]
        for target in panel["targets"]
    ]


def queries(board):
    return [item["query"] for item in DASHBOARDS[board]["templating"]["list"]]


def alerts():
    return [(rule["alert"], rule["expr"]) for group in ALERTS["groups"] for rule in group["rules"]]


def expressions():
    asked = [*panels(), *alerts()]
    return asked + [(f"{board}: variable", query) for board in DASHBOARDS for query in queries(board)]


def test_metrics_of_the_project_are_found():
    assert ours()["raystill_teacher_tokens"] == ["ray_raystill_teacher_tokens_total"]
    assert len(panels()) > 20
    assert len(alerts()) >= 10


def test_every_metric_that_is_asked_for_is_exported():
    known = of_ray() | {name for names in ours().values() for name in names}
    unknown = {
        name: where for where, expression in expressions() for name in NAME.findall(expression) if name not in known
    }
    assert not unknown


def test_endpoint_metrics_are_those_of_its_dashboard():
    names = {name for names in ours().values() for name in names}
    asked = {name for _, expression in expressions() for name in NAME.findall(expression)}
    assert {name for name in asked if name.startswith("ray_raystill_endpoint_")} <= names


@pytest.mark.parametrize("name", sorted(ours()))
def test_every_metric_of_the_project_is_shown(name):
    text = " ".join(expression for _, expression in panels())
    assert any(re.search(rf"\b{exported}\b", text) for exported in ours()[name])


@pytest.mark.parametrize("name", DASHBOARDS)
def test_dashboard_can_be_provisioned(name):
    board = DASHBOARDS[name]
    assert board["uid"]
    assert board["title"].startswith("raystill")
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    [source] = yaml.safe_load((ROOT / "infra/monitoring/grafana/provisioning/datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    variables = {item["name"] for item in board["templating"]["list"]}
    occupied = set()
    for panel in board["panels"]:
        assert panel["datasource"]["uid"] == source["uid"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + 8)}
        assert place["x"] + place["w"] <= 24
        assert not cells & occupied, panel["title"]
        occupied |= cells
        for target in panel["targets"]:
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= variables
            assert target["expr"].count("(") == target["expr"].count(")")


def test_alerts_say_what_they_are_and_what_to_do():
    names = [name for name, _ in alerts()]
    assert len(set(names)) == len(names)
    for group in ALERTS["groups"]:
        for rule in group["rules"]:
            assert rule["labels"]["severity"] in ("page", "ticket")
            assert {"summary", "do"} == set(rule["annotations"])


def test_alerts_that_are_tested_exist():
    tests = yaml.safe_load((ROOT / "infra/monitoring/alerts_test.yaml").read_text())
    asked = {case["alertname"] for test in tests["tests"] for case in test["alert_rule_test"]}
    assert len(asked) >= 3
    assert asked <= {name for name, _ in alerts()}


def test_alerts_expect_nothing_of_a_gauge_that_goes_with_its_replica():
    """Serve sets it to 0 once, and Ray forgets it: 0 holds for no `for`, neither in an alert nor in a test's series."""
    gauge = "ray_serve_deployment_replica_healthy"
    asking = {name: expression for name, expression in alerts() if gauge in expression}
    assert asking
    for name, expression in asking.items():
        assert not re.search(rf"{gauge}\S*( by \S+)?\)* *(== 0|< 1)", expression), name
        assert "ray_serve_deployment_status" in expression, f"{name}: nothing is left to tell who is missing"
    tests = yaml.safe_load((ROOT / "infra/monitoring/alerts_test.yaml").read_text())["tests"]
    series = [item for test in tests for item in test["input_series"] if item["series"].startswith(gauge)]
    assert any(" 0 " in item["values"] for item in series)
    assert all(re.search(r"(^| )0 stale$", item["values"]) for item in series if re.search(r"\b0\b", item["values"]))


def test_alerts_tell_of_teachers_that_never_came_and_of_those_that_went():
    """Of the first there is no gauge of a replica; Serve's word for their state is there from the start."""
    from ray.serve._private.common import DeploymentStatus

    starting = f'ray_serve_deployment_status{{deployment="Teacher"}} == {DeploymentStatus.UPDATING.to_numeric()}'
    asking = {expression: name for name, expression in alerts() if 'status{deployment="Teacher"}' in expression}
    assert [name for expression, name in asking.items() if starting in expression] == ["TeacherDoesNotCome"]
    assert [name for expression, name in asking.items() if starting.replace("==", "!=") in expression] == ["NoTeacher"]


def test_prometheus_scrapes_the_port_that_the_stack_exports():
    scrape = yaml.safe_load((ROOT / "infra/monitoring/prometheus.yml").read_text())
    [job] = scrape["scrape_configs"]
    [found] = job["dns_sd_configs"]
    compose = yaml.safe_load((ROOT / "infra/compose.yaml").read_text())["services"]
    for name in found["names"]:
        assert f"--metrics-export-port={found['port']}" in compose[name]["command"]
