"""Labels of nodes in the files for AWS and Kubernetes, and what pools ask for: what Ray takes, and what some node has.

Ray sets labels that begin with `ray.io/` itself, and says of `ray.io/market-type` only what the machine's environment
says, which `ray up` does not: such a label is none of a node type's own.
"""

import re
from pathlib import Path

import pytest
import yaml
from ray._private.label_utils import validate_label_selector, validate_node_label_syntax, validate_node_labels

from cluster.pools import PoolsConfig

ROOT = Path(__file__).parents[2]


def of_aws():
    """Of every node type, also of those that are commented out."""
    text = (ROOT / "cluster" / "aws.yaml").read_text()
    return [(f"aws.yaml {found}", yaml.safe_load(found)) for found in re.findall(r"(?m)^[ #]* labels: (\{.*\})$", text)]


def of_kubernetes():
    for path in sorted((ROOT / "infra" / "kuberay").glob("*.yaml")):
        for item in yaml.safe_load_all(path.read_text()):
            spec = item.get("spec", {})
            cluster = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
            for group in [cluster.get("headGroupSpec", {}), *cluster.get("workerGroupSpecs", [])]:
                assert "labels" not in group.get("rayStartParams", {}), "KubeRay refuses them there"
                if "labels" in group:
                    yield f"{path.name} {group['groupName']}", group["labels"]


def selectors():
    """What documents and examples say that a pool may ask for."""
    for path in [
        *ROOT.glob("*.md"),
        *ROOT.glob("[a-z]*/**/*.md"),
        *ROOT.glob("cluster/*"),
        *ROOT.glob("jobs/configs/*"),
    ]:
        if path.is_file():
            for pool, found in re.findall(r"(\w+_labels): (\{[^{}]+\})", path.read_text()):
                yield f"{path.relative_to(ROOT)} {found}", pool, yaml.safe_load(found)


LABELS, SELECTORS = [*of_aws(), *of_kubernetes()], [*selectors()]


def test_labels_and_selectors_are_found():
    assert {labels["pool"] for _, labels in LABELS} == {"head", "cpu", "teacher", "student"}
    assert len(of_aws()) == 5
    assert len(SELECTORS) >= 2


@pytest.mark.parametrize(("where", "labels"), LABELS)
def test_labels_of_nodes_are_taken_by_ray(where, labels):
    validate_node_label_syntax(labels)
    validate_node_labels(labels)


@pytest.mark.parametrize(("where", "pool", "selector"), SELECTORS)
def test_labels_that_a_pool_asks_for_are_those_of_some_node(where, pool, selector):
    assert validate_label_selector(selector) is None
    assert PoolsConfig.model_validate({pool: selector}).labels(pool.removesuffix("_labels")) == selector
    assert any(selector.items() <= labels.items() for _, labels in LABELS)
