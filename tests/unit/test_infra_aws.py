"""`cluster/aws.yaml` as Ray reads it once it is filled, what it promises, and the scripts that make a node of it."""

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cluster.connection import Connection
from cluster.errors import PlacementError
from jobs.config import RunConfig
from jobs.preflight import check_cluster

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "cluster" / "aws.yaml"
OUTPUTS = {
    "name": "raystill",
    "region": "us-east-1",
    "availability_zones": "us-east-1a,us-east-1b",
    "bucket": "my-bucket",
    "private_subnet_ids": ["subnet-a", "subnet-b"],
    "nodes_group_id": "sg-1",
    "head_profile_arn": "arn:aws:iam::1:instance-profile/raystill-head",
    "worker_profile_arn": "arn:aws:iam::1:instance-profile/raystill-worker",
    "database_host": "db.example.internal",
    "secret_arn": "arn:aws:secretsmanager:us-east-1:1:secret:rds-x",
    "image_id": "ami-1",
}


def fill(outputs, template=TEMPLATE):
    return subprocess.run(
        [sys.executable, str(ROOT / "infra" / "fill.py"), str(template)],
        input=json.dumps({name: {"value": value, "sensitive": False} for name, value in outputs.items()}),
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def filled():
    done = fill(OUTPUTS)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def test_filling_leaves_no_place_open_and_keeps_lists(filled):
    assert "FILL:" not in yaml.safe_dump(filled)
    assert filled["available_node_types"]["head"]["node_config"]["SubnetIds"] == ["subnet-a", "subnet-b"]
    assert filled["setup_commands"] == [
        f"bash ~/raystill/setup.sh us-east-1 db.example.internal {OUTPUTS['secret_arn']} my-bucket"
    ]


def test_filling_takes_the_outputs_that_terraform_gives():
    declared = re.findall(r'^output "(\w+)"', (ROOT / "infra/terraform/outputs.tf").read_text(), re.MULTILINE)
    assert set(declared) == set(OUTPUTS)
    assert set(re.findall(r"FILL:([a-z_]+)", re.sub(r"#.*", "", TEMPLATE.read_text()))) == set(OUTPUTS)


def test_filling_without_a_value_names_it_and_prints_nothing():
    done = fill({name: value for name, value in OUTPUTS.items() if name != "secret_arn"})
    assert done.returncode == 1
    assert not done.stdout
    assert "wants 'secret_arn'" in done.stderr
    nonsense = subprocess.run(
        [sys.executable, str(ROOT / "infra" / "fill.py"), str(TEMPLATE)], input="no", capture_output=True, text=True
    )
    assert nonsense.returncode == 1
    assert "apply first" in nonsense.stderr


def test_cluster_is_one_that_ray_takes(filled):
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(filled)
    prepared = prepare_config(filled)
    validate_config(prepared)
    nightly = [line for line in prepared["setup_commands"] if "ray-wheels" in line]
    assert not nightly, "a default of Ray's came through"
    assert prepared["head_setup_commands"] == filled["setup_commands"]
    with pytest.raises(Exception, match=r"Additional properties|pool"):
        validate_config({**filled, "pool": 1})


def test_cluster_has_no_spot_no_public_address_and_the_second_metadata_service(filled):
    kinds = filled["available_node_types"]
    assert set(kinds) == {"head", "cpu", "teacher", "student"}
    for name, kind in kinds.items():
        machine = kind["node_config"]
        assert "InstanceMarketOptions" not in machine, name
        assert "NetworkInterfaces" not in machine, name
        assert machine["MetadataOptions"]["HttpTokens"] == "required", name
        assert all(disk["Ebs"]["Encrypted"] for disk in machine["BlockDeviceMappings"]), name
        assert machine["SecurityGroupIds"] == ["sg-1"], name
        assert machine["IamInstanceProfile"]["Arn"].endswith("head" if name == "head" else "worker"), name
    assert filled["provider"]["use_internal_ips"] is True
    assert filled["head_node_type"] == "head"
    assert kinds["head"]["resources"] == {"CPU": 0}
    assert kinds["teacher"]["resources"]["GPU"] >= 1
    assert kinds["student"]["resources"]["GPU"] >= 1


def test_people_come_through_session_manager_of_the_clusters_region(filled):
    command = filled["auth"]["ssh_proxy_command"].split()
    assert command[:3] == ["aws", "ssm", "start-session"]
    assert command[command.index("--region") + 1] == OUTPUTS["region"]
    assert command[-1] == "portNumber=%p"


def test_run_is_accepted_while_all_nodes_are_at_zero_if_they_may_grow_to_it(filled, tmp_path, monkeypatch):
    """On the head, which knows from its own copy of the file what may be started."""
    import copy

    kinds = filled["available_node_types"]
    assert [kind["min_workers"] for kind in kinds.values()] == [0] * len(kinds), "nothing is paid for between runs"
    head = {"Resources": {"memory": 1.0}, "Labels": {}, "NodeManagerAddress": "10.42.0.1", "Alive": True}
    monkeypatch.setattr("ray.nodes", lambda: [head])
    monkeypatch.setattr("cluster.placement.BOOTSTRAP", tmp_path / "bootstrap.yaml")
    (tmp_path / "bootstrap.yaml").write_text(yaml.safe_dump(filled))
    config = RunConfig.model_validate(
        {
            "name": "small",
            "data": {"sources": ["s3://bucket/corpus/"]},
            "teacher": {"model": "s3://bucket/teacher", "num_gpus": 1, "replicas": 16},
            "student": {"from_teacher": {"layers": [0]}},
            "train": {"steps": 10, "global_batch": 64, "num_workers": 32, "use_gpu": True},
            "cluster": {"pools": {}},
        }
    )
    there = Connection(False, 0, None, config.cluster.pools)
    check_cluster(config, there)
    fewer = copy.deepcopy(filled)
    fewer["available_node_types"]["student"]["max_workers"] = 3
    (tmp_path / "bootstrap.yaml").write_text(yaml.safe_dump(fewer))
    with pytest.raises(PlacementError, match="the cluster has 896"):
        check_cluster(config, there)


def test_spot_nodes_are_a_comment_that_ray_takes_and_every_worker_listens_for_its_end(filled):
    from ray.autoscaler._private.util import prepare_config, validate_config

    text = TEMPLATE.read_text()
    [block] = re.findall(r"(?m)^  # teacher_spot:\n(?:  #  .*\n)+", text)
    plain = text.replace(block, re.sub(r"(?m)^  # ", "  ", block))
    kind = yaml.safe_load(plain)["available_node_types"]["teacher_spot"]
    assert kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert kind["node_config"]["IamInstanceProfile"] == {"Arn": "FILL:worker_profile_arn"}
    assert kind["labels"]["market"] == "spot"
    validate_config(prepare_config(yaml.safe_load(plain)))
    starts = filled["worker_start_ray_commands"]
    assert "ray start" in starts[-2]
    assert starts[-1] == ". ~/raystill/environment && bash ~/raystill/watch_spot.sh"
    assert "/home/ec2-user/raystill/watch_spot.sh" in filled["file_mounts"]


def test_cluster_dashboard_is_private_and_every_process_knows_the_token(filled):
    head = " ".join(filled["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head
    starts = [*filled["head_start_ray_commands"], *filled["worker_start_ray_commands"]]
    assert all(line.startswith(". ~/raystill/environment && ") for line in starts)
    assert "export RAY_AUTH_MODE=token" in (ROOT / "infra/aws/setup.sh").read_text()
    assert any(target.endswith("/.ray/auth_token") for target in filled["file_mounts"])


def test_cluster_installs_the_wheel_of_this_version_at_the_pinned_versions(filled):
    import tomllib

    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    wheel = f"raystill-{version}-py3-none-any.whl"
    assert f"dist/{wheel}" in filled["file_mounts"].values()
    setup = (ROOT / "infra/aws/setup.sh").read_text()
    assert wheel in setup
    assert "--constraint" in setup
    for local in filled["file_mounts"].values():
        assert local.startswith(("dist/", "~")) or (ROOT / local).is_file(), local


# --- the scripts, with stand-ins for AWS's programs ------------------------------------------------------------------


def program(directory, name, text):
    path = directory / name
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def machine(tmp_path):
    """A home and a directory of programs."""
    (tmp_path / "home").mkdir()
    (tmp_path / "bin").mkdir()
    environment = {"HOME": str(tmp_path / "home"), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    return tmp_path / "home", tmp_path / "bin", environment


def test_database_password_goes_to_a_private_file_and_nowhere_else(machine):
    home, programs, environment = machine
    secret = json.dumps({"username": "raystill", "password": "a:b\\c'd$e"})
    program(programs, "aws", f"cat <<'EOF'\n{secret}\nEOF")
    script = ROOT / "infra/aws/database.sh"
    done = subprocess.run(
        ["bash", str(script), "us-east-1", "db.internal", "arn:x"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (home / ".pgpass").read_text() == "db.internal:5432:mlflow:raystill:a\\:b\\\\c'd$e\n"
    assert stat.S_IMODE((home / ".pgpass").stat().st_mode) == 0o600
    assert done.stdout + done.stderr == ""
    assert [path.name for path in home.iterdir()] == [".pgpass"]


def test_database_password_that_cannot_be_read_keeps_the_one_before(machine):
    home, programs, environment = machine
    (home / ".pgpass").write_text("before")
    program(programs, "aws", "echo no >&2; exit 1")
    script = ROOT / "infra/aws/database.sh"
    done = subprocess.run(["bash", str(script), "r", "h", "s"], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert (home / ".pgpass").read_text() == "before"
    assert [path.name for path in home.iterdir()] == [".pgpass"]


def test_mlflow_is_started_for_this_machine_alone_and_once(machine):
    home, programs, environment = machine
    program(programs, "curl", "test -e $HOME/up")
    program(programs, "mlflow", 'echo "$@" >$HOME/asked; echo "$MLFLOW_BACKEND_STORE_URI" >$HOME/store; touch $HOME/up')
    environment |= {"RAYSTILL_DATABASE_URL": "postgresql://raystill@db:5432/mlflow", "RAYSTILL_BUCKET": "b"}
    for _ in range(2):
        done = subprocess.run(["bash", str(ROOT / "infra/aws/mlflow.sh")], env=environment, capture_output=True)
        assert done.returncode == 0
        deadline = 100
        while not (home / "up").exists() and deadline:
            subprocess.run(["sleep", "0.05"], check=True)
            deadline -= 1
    assert "--host 127.0.0.1" in (home / "asked").read_text()
    assert "postgresql" not in (home / "asked").read_text(), "a command line can be read by others"
    assert (home / "store").read_text() == "postgresql+psycopg://raystill@db:5432/mlflow\n"


def test_node_is_set_up_and_again_without_a_change(machine):
    """The programs of the system are stand-ins that write down what they are asked."""
    import shutil

    home, programs, environment = machine
    here = home / "raystill"
    here.mkdir()
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("token")
    for name in ("setup.sh", "database.sh"):
        shutil.copy(ROOT / "infra/aws" / name, here / name)
    pip = 'mkdir -p "$3/bin"; printf \'#!/bin/sh\\necho pip "$@" >>$HOME/asked\\n\' | tee "$3/bin/pip" >"$3/bin/python"'
    program(programs, "python3.11", f'echo venv >>$HOME/asked; {pip}; chmod +x "$3"/bin/*')
    program(programs, "crond", "true")
    program(programs, "sudo", 'echo "sudo $*" >>$HOME/asked')
    program(programs, "crontab", "cat >$HOME/crontab")
    program(programs, "aws", 'echo \'{"password": "p4ss"}\'')
    arguments = ["us-east-1", "db.internal", "arn:x", "my-bucket"]
    for _ in range(2):
        done = subprocess.run(
            ["bash", str(here / "setup.sh"), *arguments], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    asked = (home / "asked").read_text().splitlines()
    assert asked.count("venv") == 1
    install, wheel, *again = [line for line in asked if line.startswith("pip install")]
    assert [install, wheel] == again
    assert f"--constraint {here}/constraints.txt raystill[postgres] @ file://{here}/raystill-" in install
    assert f" --no-deps --force-reinstall {here}/raystill-" in wheel, "a wheel that was built again has the old version"
    assert stat.S_IMODE((home / ".ray" / "auth_token").stat().st_mode) == 0o600
    assert (home / "crontab").read_text() == f"*/10 * * * * bash {here}/database.sh us-east-1 db.internal arn:x\n"
    told = subprocess.run(
        ["bash", "-c", f". {here}/environment; echo $RAYSTILL_DATABASE_URL $RAY_AUTH_MODE $RAYSTILL_BUCKET"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert told.stdout.split() == [
        "postgresql://raystill@db.internal:5432/mlflow?sslmode=require",
        "token",
        "my-bucket",
    ]
    assert "p4ss" not in (here / "environment").read_text() + done.stdout
    assert (home / ".pgpass").read_text() == "db.internal:5432:mlflow:raystill:p4ss\n"


def test_spot_watcher_is_a_unit_that_outlives_its_connection_and_watches_for_one_ray(machine):
    """systemd is a stand-in that runs the unit at once."""
    import shutil

    home, programs, environment = machine
    (home / "raystill").mkdir()
    script = shutil.copy(ROOT / "infra/aws/watch_spot.sh", home / "raystill" / "watch_spot.sh")
    (home / "raystill" / "environment").write_text("export RAY_AUTH_MODE=token\n")
    program(programs, "sudo", 'exec "$@"')
    program(programs, "systemctl", 'echo "systemctl $*" >>$HOME/asked; exit 5')
    program(
        programs,
        "systemd-run",
        'echo "systemd-run $*" >>$HOME/asked; while [ "${1#-}" != "$1" ]; do shift; done; exec "$@"',
    )
    program(programs, "raystill", 'echo "raystill $* $RAY_AUTH_MODE" >>$HOME/asked')
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stopped, started, watches = (home / "asked").read_text().splitlines()
    assert stopped == "systemctl stop raystill-watch-spot", "the one before knows a node that is gone"
    assert "--unit=raystill-watch-spot" in started
    assert "--property=Restart=on-failure" in started
    assert watches == "raystill watch-spot token"


def test_local_secrets_are_made_once_and_hidden(tmp_path):
    import shutil

    shutil.copy(ROOT / "infra/local/secrets.sh", tmp_path / "secrets.sh")
    subprocess.run(["bash", str(tmp_path / "secrets.sh")], check=True, capture_output=True)
    directory = tmp_path / "secrets"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    first = {path.name: path.read_text() for path in directory.iterdir()}
    secrets = [first[name] for name in ("ray_token", "postgres_password", "grafana_password", "s3_key", "s3_secret")]
    assert len(set(secrets)) == 5
    assert all(re.fullmatch(r"[0-9a-f]{48}", secret) for secret in secrets)
    [identity] = json.loads(first["s3_identities.json"])["identities"]
    assert identity["credentials"] == [{"accessKey": first["s3_key"], "secretKey": first["s3_secret"]}]
    assert first["s3_secret"] in first["s3_credentials"]
    again = subprocess.run(["bash", str(tmp_path / "secrets.sh")], check=True, capture_output=True, text=True)
    assert {path.name: path.read_text() for path in directory.iterdir()} == first
    assert not any(secret in again.stdout for secret in secrets)


@pytest.fixture
def account(tmp_path, monkeypatch):
    """A mock of AWS with what Terraform makes, and a cluster file filled with it."""
    import boto3
    from moto import mock_aws

    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "mock")
    with mock_aws():
        ec2, iam = boto3.client("ec2", "us-east-1"), boto3.client("iam")
        vpc = ec2.create_vpc(CidrBlock="10.42.0.0/16")["Vpc"]["VpcId"]
        subnets = [
            ec2.create_subnet(VpcId=vpc, CidrBlock=f"10.42.{16 * place}.0/20", AvailabilityZone=f"us-east-1{zone}")
            for place, zone in enumerate("ab")
        ]
        group = ec2.create_security_group(GroupName="raystill-nodes", Description="nodes", VpcId=vpc)["GroupId"]
        profiles = {}
        for role in ("head", "worker"):
            made = iam.create_instance_profile(InstanceProfileName=f"raystill-{role}")
            profiles[f"{role}_profile_arn"] = made["InstanceProfile"]["Arn"]
        image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
        ids = {"private_subnet_ids": [item["Subnet"]["SubnetId"] for item in subnets], "nodes_group_id": group}
        done = fill({**OUTPUTS, **profiles, **ids, "image_id": image})
        yield yaml.safe_load(done.stdout), ec2


def test_cluster_starts_its_machines_on_a_mock_of_aws_as_the_file_says(account):
    from ray.autoscaler._private.aws import config as aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config

    cluster, ec2 = account
    made = aws.bootstrap_aws(prepare_config(cluster))
    kinds = made["available_node_types"]
    provider = AWSNodeProvider(made["provider"], made["cluster_name"])
    for kind in ("head", "teacher"):
        tags = {"ray-node-type": "head" if kind == "head" else "worker", "ray-user-node-type": kind}
        provider.create_node(dict(kinds[kind]["node_config"]), tags, 1)
    machines = [item for group in ec2.describe_instances()["Reservations"] for item in group["Instances"]]
    assert {item["InstanceType"] for item in machines} == {"m7i.2xlarge", "g6e.12xlarge"}
    for machine in machines:
        assert {"Key": "ray-cluster-name", "Value": "raystill"} in machine["Tags"], "the head's role is bound to it"
        assert machine["MetadataOptions"]["HttpTokens"] == "required"
        assert "PublicIpAddress" not in machine
        assert "InstanceLifecycle" not in machine, "spot"
        role = "head" if machine["InstanceType"].startswith("m7i") else "worker"
        assert machine["IamInstanceProfile"]["Arn"].endswith(role)
        assert [group["GroupId"] for group in machine["SecurityGroups"]] == cluster["available_node_types"]["head"][
            "node_config"
        ]["SecurityGroupIds"]
    groups = ec2.describe_security_groups()["SecurityGroups"]
    assert not [item for item in groups if item["GroupName"].startswith("ray-autoscaler")], "Ray made one of its own"
