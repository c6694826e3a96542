"""The Terraform configuration read as HCL: every variable is explained and used, every reference leads somewhere, no
role may do more than it has to, nothing is open, nothing secret is given out. `make infra` asks the provider too."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hcl2
import pytest
from hcl2 import SerializationOptions

HERE = Path(__file__).parents[2] / "infra" / "terraform"
MODULES = {"root": HERE, **{path.name: path for path in sorted((HERE / "modules").iterdir())}}
OPTIONS = SerializationOptions(with_comments=False, explicit_blocks=False, strip_string_quotes=True)
CANNOT_BE_NARROWED = re.compile(r"ec2:Describe\w+")
"""Actions that AWS knows without resources."""


def read(directory: Path) -> dict[str, list[Any]]:
    """All blocks of a module by their kind."""
    blocks: dict[str, list[Any]] = {}
    for path in sorted(directory.glob("*.tf")):
        for kind, found in hcl2.loads(path.read_text(), serialization_options=OPTIONS).items():
            blocks.setdefault(kind, []).extend(found)
    return blocks


BLOCKS = {name: read(path) for name, path in MODULES.items()}
TEXTS = {
    name: "\n".join(re.sub(r"(?m)^\s*(#|//).*$", "", path.read_text()) for path in sorted(directory.glob("*.tf")))
    for name, directory in MODULES.items()
}


def named(module: str, kind: str) -> dict[str, Any]:
    """Blocks with one label: variables, outputs, modules."""
    return {name: body for item in BLOCKS[module].get(kind, []) for name, body in item.items()}


def typed(module: str, kind: str) -> dict[tuple[str, str], Any]:
    """Blocks with two labels: resources and data."""
    return {
        (type_, name): body
        for item in BLOCKS[module].get(kind, [])
        for type_, inner in item.items()
        for name, body in inner.items()
    }


def resources(type_: str) -> Iterator[tuple[str, Any]]:
    for module in MODULES:
        for (found, name), body in typed(module, "resource").items():
            if found == type_:
                yield f"{module}.{name}", body


def one(type_: str) -> Any:
    [(_, body)] = resources(type_)
    return body


def text_of(value: Any) -> str:
    return str(value)


def test_modules_are_read():
    assert set(MODULES) == {"root", "network", "storage", "identity", "database"}
    assert sum(len(typed(module, "resource")) for module in MODULES) > 35


@pytest.mark.parametrize("module", MODULES)
def test_every_variable_is_explained_typed_and_used(module):
    variables = named(module, "variable")
    used = set(re.findall(r"\bvar\.(\w+)", TEXTS[module].replace("description", "")))
    assert variables
    for name, body in variables.items():
        assert len(body["description"]) > 10, name
        assert body["type"], name
    assert used == set(variables)


@pytest.mark.parametrize("module", MODULES)
def test_every_output_is_explained_and_no_secret_is_given_out(module):
    for name, body in named(module, "output").items():
        assert len(body["description"]) > 5, name
        assert not re.search(r"password|secret_string|private_key|token", text_of(body["value"])), name


@pytest.mark.parametrize("module", MODULES)
def test_every_reference_leads_somewhere(module):
    there = {".".join(key) for key in typed(module, "resource")}
    data = {".".join(key) for key in typed(module, "data")}
    local = {name for item in BLOCKS[module].get("locals", []) for name in item}
    text = TEXTS[module]
    for found in re.findall(r"(?<![\w.])(aws_\w+\.\w+)", re.sub(r"\bdata\.aws_\w+\.\w+", "", text)):
        assert found in there, found
    for found in re.findall(r"\bdata\.(aws_\w+\.\w+)", text):
        assert found in data, found
    for found in re.findall(r"\blocal\.(\w+)", text):
        assert found in local, found
    used = set(re.findall(r"\bdata\.(aws_\w+\.\w+)", text))
    assert data == used, "a data source that nobody asks"


def test_every_module_is_given_what_it_asks_for_and_gives_what_is_taken():
    calls = named("root", "module")
    assert {body["source"].rpartition("/")[2] for body in calls.values()} == set(MODULES) - {"root"}
    for name, body in calls.items():
        variables = named(name, "variable")
        given = set(body) - {"source", "depends_on", "count", "providers"}
        assert given <= set(variables), f"{name} knows no {given - set(variables)}"
        assert {item for item, inner in variables.items() if "default" not in inner} <= given, name
    taken = re.findall(r"\bmodule\.(\w+)\.(\w+)", TEXTS["root"])
    assert taken
    for name, output in taken:
        assert output in named(name, "output"), f"module.{name}.{output}"
    unused = [(name, output) for name in calls for output in named(name, "output") if (name, output) not in taken]
    assert not unused


def test_provider_and_terraform_have_bounds():
    [terraform] = BLOCKS["root"]["terraform"]
    assert terraform["required_version"].startswith(">= 1.")
    [providers] = terraform["required_providers"]
    assert providers["aws"]["version"].startswith("~>")


def statements() -> list[tuple[str, dict[str, Any]]]:
    found = []
    for module in MODULES:
        for (type_, name), body in typed(module, "data").items():
            if type_ == "aws_iam_policy_document":
                plain = body.get("statement", [])
                dynamic = [item["statement"]["content"][0] for item in body.get("dynamic", [])]
                found += [(f"{module}.{name}", item) for item in [*plain, *dynamic]]
    return found


def test_roles_may_do_nothing_by_wildcard():
    assert len(statements()) > 10
    for name, statement in statements():
        if statement.get("effect") == "Deny":
            continue
        for action in statement["actions"]:
            assert "*" not in action, f"{name}: {action}"
        if "resources" not in statement:  # who may take the role
            assert statement["principals"], name
            continue
        resources = text_of(statement["resources"])
        if "'*'" in resources or resources.strip("[]'\"") == "*":
            assert all(CANNOT_BE_NARROWED.fullmatch(action) for action in statement["actions"]), name
            assert statement["condition"], name


def test_head_starts_and_ends_only_machines_of_its_cluster():
    of_scale = {item.get("sid"): item for name, item in statements() if name == "identity.scale"}
    for sid, action in {"StartTagged": "ec2:RunInstances", "OwnMachines": "ec2:TerminateInstances"}.items():
        statement = of_scale[sid]
        assert action in statement["actions"]
        assert any("ray-cluster-name" in condition["variable"] for condition in statement["condition"])
    assert any("MetadataHttpTokens" in condition["variable"] for condition in of_scale["StartTagged"]["condition"])
    assert "spot-instances-request/*" in text_of(of_scale["StartWith"]["resources"]), "what a spot machine is asked by"
    assert of_scale["HandOnWorkerRole"]["resources"] == ["${aws_iam_role.worker.arn}"]
    [(_, worker)] = [item for item in resources("aws_iam_role_policy_attachment") if item[0].endswith("worker_data")]
    of_worker = [body for name, body in resources("aws_iam_role_policy_attachment") if "worker" in name]
    assert of_worker == [worker], "workers have the data and nothing else"


def test_nothing_leads_in_from_outside():
    rules = dict(resources("aws_security_group_rule"))
    assert len(rules) >= 5
    for name, rule in rules.items():
        assert len(rule["description"]) > 5, name
        if rule["type"] == "ingress":
            assert "cidr_blocks" not in rule, name
        elif "0.0.0.0/0" in text_of(rule.get("cidr_blocks", "")):
            assert (rule["from_port"], rule["to_port"]) == (443, 443), name
    for name, subnet in resources("aws_subnet"):
        assert subnet["map_public_ip_on_launch"] is False, name
    assert not list(resources("aws_instance"))


def test_bucket_is_private_encrypted_versioned_and_swept():
    blocked = one("aws_s3_bucket_public_access_block")
    assert [blocked[key] for key in ("block_public_acls", "block_public_policy", "ignore_public_acls")] == [True] * 3
    assert blocked["restrict_public_buckets"] is True
    assert one("aws_s3_bucket_versioning")["versioning_configuration"][0]["status"] == "Enabled"
    assert "AES256" in text_of(one("aws_s3_bucket_server_side_encryption_configuration"))
    assert {rule["id"] for rule in one("aws_s3_bucket_lifecycle_configuration")["rule"]} == {
        "unfinished-uploads",
        "old-versions",
    }
    denied = [item for name, item in statements() if item.get("effect") == "Deny"]
    assert any(condition["variable"] == "aws:SecureTransport" for item in denied for condition in item["condition"])


def test_database_is_private_encrypted_and_keeps_its_password_to_itself():
    database = one("aws_db_instance")
    assert database["publicly_accessible"] is False
    assert database["storage_encrypted"] is True
    assert database["manage_master_user_password"] is True
    assert "password" not in database
    assert "rds.force_ssl" in text_of(one("aws_db_parameter_group"))
    assert text_of(database["deletion_protection"]) == "${var.protect}"
