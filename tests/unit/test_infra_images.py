"""What the image and the local stack promise: a plain user, pinned versions, secrets in files, ports on loopback."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "infra" / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "infra" / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
TAG = re.compile(r"[a-z0-9/.-]+:[\w.-]*\d[\w.-]*(@sha256:[0-9a-f]{64})?")


def test_image_runs_as_a_plain_user_at_the_pinned_versions():
    stages = DOCKERFILE.split("\nFROM ")
    assert len(stages) == 3
    assert re.findall(r"^USER (.+)$", stages[-1], re.MULTILINE) == ["1000:1000"]
    assert TAG.fullmatch(re.search(r"^ARG PYTHON_IMAGE=(.+)$", DOCKERFILE, re.MULTILINE)[1])
    installs = re.findall(r"pip install ([^\n]+)", DOCKERFILE)
    assert all("--constraint infra/constraints.txt" in line or "--no-deps" in line for line in installs)
    assert {"cpu", "cuda"} <= set(re.findall(r"^\s+(\w+)\) ", DOCKERFILE, re.MULTILINE))
    assert not re.search(r"^(ENV|ARG) .*(PASSWORD|TOKEN|SECRET)=", DOCKERFILE, re.MULTILINE)


def test_image_sees_only_what_it_is_made_of():
    lines = (ROOT / "infra" / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    copied = {
        path for line in re.findall(r"^COPY ([a-zA-Z].*)$", DOCKERFILE, re.MULTILINE) for path in line.split()[:-1]
    }
    kept = {rule[1:] for rule in rules if rule.startswith("!")}
    assert {path.split("/")[0] if path != "infra/constraints.txt" else path for path in copied} == kept
    for path in copied:
        assert (ROOT / path).exists(), path


def test_stack_has_every_part():
    names = {"s3", "postgres", "mlflow", "ray-head", "ray-worker", "prometheus", "grafana"}
    assert names <= set(SERVICES)
    assert SERVICES["ray-worker"]["deploy"]["replicas"] >= 2


@pytest.mark.parametrize("name", SERVICES)
def test_service_is_pinned_restrained_and_on_loopback(name):
    service = SERVICES[name]
    assert service["image"] == "raystill:cpu" or TAG.fullmatch(service["image"])
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    for port in service.get("ports", []):
        assert port.startswith("127.0.0.1:"), port


def test_secrets_are_files_and_stand_in_no_variable_and_no_command():
    assert set(COMPOSE["secrets"]) == {name for item in SERVICES.values() for name in item.get("secrets", [])}
    for name, secret in COMPOSE["secrets"].items():
        assert set(secret) == {"file"}
        assert secret["file"].startswith("local/secrets/"), name
    for name, service in SERVICES.items():
        for variable, value in service.get("environment", {}).items():
            if re.search("PASSWORD|TOKEN|SECRET|CREDENTIALS", variable):
                assert str(value).startswith("/run/secrets/"), f"{name}: {variable}"
            assert not re.search(r"://[^/@]*:[^/@]+@", str(value)), f"{name}: {variable} holds a password"
        assert "secret" not in str(service.get("command", "")).replace("/run/secrets/s3_identities", "")
    ignored = subprocess.run(
        ["git", "check-ignore", "-q", "infra/local/secrets/ray_token", "aws.filled.yaml"], cwd=ROOT, check=False
    )
    assert ignored.returncode in (0, 128)  # 128: not a git checkout


def test_secrets_that_are_named_are_made():
    script = (ROOT / "infra" / "local" / "secrets.sh").read_text()
    for secret in COMPOSE["secrets"].values():
        assert f"once {Path(secret['file']).name} " in script


def test_files_that_are_mounted_are_there():
    mounted = [item["file"] for item in COMPOSE["configs"].values()]
    mounted += [
        volume.split(":")[0] for item in SERVICES.values() for volume in item.get("volumes", []) if volume[0] == "."
    ]
    assert len(mounted) >= 5
    for path in mounted:
        assert (ROOT / "infra" / path).exists(), path


def test_password_reaches_a_command_through_a_private_file(tmp_path):
    script = (ROOT / "infra" / "local" / "with_secrets.sh").read_text()
    (tmp_path / "postgres_password").write_text("s3cret")
    (tmp_path / "run.sh").write_text(script.replace("/run/secrets", str(tmp_path)))
    done = subprocess.run(
        ["bash", str(tmp_path / "run.sh"), "sh", "-c", 'stat -c %a "$HOME/.pgpass"; cat "$HOME/.pgpass"; env'],
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("600\npostgres:5432:raystill:raystill:s3cret\n")
    assert done.stdout.count("s3cret") == 1
