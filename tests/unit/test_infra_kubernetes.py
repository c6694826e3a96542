"""What the KubeRay manifests promise: a token, no secrets, plain users, and nobody who speaks with the pods but those
who have to. `make infra` holds them against the schemas."""

from pathlib import Path

import pytest
import yaml

from cluster.config import validate
from cluster.connection import Connection
from cluster.placement import NodeShape
from jobs.config import RunConfig
from jobs.preflight import check_cluster
from jobs.threads import threads_on
from services.endpoint.schema import EndpointArguments

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "infra" / "kuberay"
OBJECTS = [
    (path.name, item)
    for path in sorted(MANIFESTS.glob("*.yaml"))
    for item in yaml.safe_load_all(path.read_text())
    if item["kind"] != "Kustomization"
]


def below(node, key):
    """Every value of a key, anywhere."""
    if isinstance(node, dict):
        if key in node:
            yield node[key]
        for value in node.values():
            yield from below(value, key)
    elif isinstance(node, list):
        for value in node:
            yield from below(value, key)


def of_kind(kind):
    return [item for _, item in OBJECTS if item["kind"] == kind]


def clusters():
    [cluster], [job], [service] = of_kind("RayCluster"), of_kind("RayJob"), of_kind("RayService")
    return [cluster["spec"], job["spec"]["rayClusterSpec"], service["spec"]["rayClusterConfig"]]


def pods():
    specs = [spec for _, item in OBJECTS for spec in below(item, "spec") if "containers" in spec]
    assert len(specs) >= 9
    return specs


@pytest.mark.parametrize("spec", clusters(), ids=["cluster", "job", "service"])
def test_clusters_ask_for_the_token_of_a_secret_and_run_the_pinned_ray(spec):
    assert spec["authOptions"] == {"mode": "token", "secretName": "raystill-token"}
    assert f'ray[train,serve]=={spec["rayVersion"]}"' in (ROOT / "pyproject.toml").read_text()
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert "cpu" in groups
    for name, group in groups.items():
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        [container] = group["template"]["spec"]["containers"]
        has_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
        assert has_gpu == (name in ("teacher", "student")), name
        assert container["image"].endswith("cuda" if has_gpu else "cpu")


def test_manifests_hold_no_secret():
    assert not of_kind("Secret")
    for name, item in OBJECTS:
        for variables in below(item, "env"):
            for variable in variables:
                secret = any(word in variable["name"] for word in ("PASSWORD", "TOKEN", "SECRET"))
                assert ("valueFrom" in variable) == secret, f"{name}: {variable['name']}"
        text = yaml.safe_dump(item)
        assert "@" not in text or "raystill@" in text
        assert not any(
            ":" in url.partition("//")[2].partition("@")[0] for url in text.split() if "postgresql://" in url
        )


def test_pods_are_plain_users_with_limits():
    for spec in pods():
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["serviceAccountName"] in ("raystill", "raystill-head")
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"] == container["resources"]["requests"]


def test_only_heads_hold_an_account_of_kubernetes():
    for account in of_kind("ServiceAccount"):
        assert account["automountServiceAccountToken"] is False
    for spec in clusters():
        head = spec["headGroupSpec"]["template"]["spec"]
        assert (head["serviceAccountName"], head["automountServiceAccountToken"]) == ("raystill-head", True)
        for group in spec["workerGroupSpecs"]:
            assert "automountServiceAccountToken" not in group["template"]["spec"]


def test_network_is_closed_but_for_who_has_to():
    policies = {item["metadata"]["name"]: item["spec"] for item in of_kind("NetworkPolicy")}
    assert policies["nothing"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for name, policy in policies.items():
        for rule in policy.get("ingress", []):
            assert rule["from"], name
            assert not any("ipBlock" in peer for peer in rule["from"]), f"{name}: an address from outside"
        for rule in policy.get("egress", []):
            for peer in rule["to"]:
                if block := peer.get("ipBlock"):
                    assert "169.254.169.254/32" in block["except"]
                    assert rule["ports"]
    reached = {
        (peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"], port["port"])
        for rule in policies["ray"]["ingress"]
        for peer in rule["from"]
        if "namespaceSelector" in peer
        for port in rule["ports"]
    }
    assert ("ingress", 8265) not in reached, "the dashboard is for the operator alone"
    assert reached == {("kuberay-system", 8265), ("kuberay-system", 52365), ("monitoring", 8080), ("ingress", 8000)}


def test_job_runs_a_config_that_is_valid_in_the_file_that_is_mounted():
    [config] = [item for name, item in OBJECTS if name == "job.yaml" and item["kind"] == "ConfigMap"]
    loaded = validate(RunConfig, yaml.safe_load(config["data"]["run.yaml"]), "run.yaml")
    [job] = of_kind("RayJob")
    spec = job["spec"]
    assert spec["entrypoint"] == "python -m jobs run /home/ray/run/run.yaml"
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["backoffLimit"] > 0
    mounts = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert {"name": "run", "mountPath": "/home/ray/run", "readOnly": True} in mounts
    gpus = {group["groupName"]: group["minReplicas"] for group in spec["rayClusterSpec"]["workerGroupSpecs"]}
    assert (
        gpus["teacher"] + gpus["student"]
        == loaded.teacher.replicas * loaded.teacher.num_gpus + loaded.train.num_workers
    )


def shapes(spec, replicas):
    """The nodes of a cluster with so many replicas of each group as one of its keys says, as Ray would tell of them."""
    for number, group in enumerate(spec["workerGroupSpecs"]):
        [container] = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        resources = {name: float(amount) for name, amount in group.get("resources", {}).items()}
        resources |= {"CPU": float(limits["cpu"]), "GPU": float(limits.get("nvidia.com/gpu", 0))}
        yield from [
            NodeShape(resources, group["labels"], host=f"10.0.{number}.{node}") for node in range(group[replicas])
        ]


@pytest.mark.parametrize("replicas", ["minReplicas", "replicas", "maxReplicas"])
def test_job_is_not_refused_on_the_nodes_that_it_starts_with_nor_on_all(monkeypatch, replicas):
    """The endpoint's place is on a node that comes once it is asked for."""
    [config] = [item for name, item in OBJECTS if name == "job.yaml" and item["kind"] == "ConfigMap"]
    loaded = validate(RunConfig, yaml.safe_load(config["data"]["run.yaml"]), "run.yaml")
    [job] = of_kind("RayJob")
    spec = job["spec"]["rayClusterSpec"]
    of_all = sum(node.resources["CPU"] for node in shapes(spec, "maxReplicas"))
    assert loaded.cluster.num_cpus == of_all
    nodes = [NodeShape({"CPU": 0.0}, host="10.1.0.0"), *shapes(spec, replicas)]
    there = sum(node.resources["CPU"] for node in nodes)
    monkeypatch.setattr("jobs.preflight.cluster_nodes", lambda: nodes)
    check_cluster(loaded, Connection(False, max(there, of_all), None, loaded.cluster.pools))
    threads = threads_on(nodes, loaded.cluster.pools, loaded)
    assert (threads.worker, threads.replica) == (24, 12), "all of a node, which has one place"


def test_service_starts_an_application_that_is_there_with_arguments_that_it_takes():
    from importlib import import_module

    [service] = of_kind("RayService")
    serve = yaml.safe_load(service["spec"]["serveConfigV2"])
    from ray.serve.schema import ServeDeploySchema

    ServeDeploySchema.model_validate(serve)
    [application] = serve["applications"]
    module, _, name = application["import_path"].partition(":")
    assert callable(getattr(import_module(module), name))
    validate(EndpointArguments, application["args"], "service.yaml")
