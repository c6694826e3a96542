"""`infra/check.py`: a failure fails, a tool that is not there is named, schemas refuse what they do not know."""

import contextlib
import importlib.util
import json
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("infra_check", Path(__file__).parents[2] / "infra" / "check.py")
check = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check)


def absent():
    raise check.Absent("tool is not installed (from there)")


def failed():
    raise check.Failed("line 3: wrong")


def made(monkeypatch, capsys, checks, *arguments):
    monkeypatch.setattr(check, "CHECKS", checks)
    monkeypatch.setattr("sys.argv", ["check.py", *arguments])
    with pytest.raises(SystemExit) as end:
        check.main()
    return end.value.code, capsys.readouterr().out


def test_check_that_fails_is_an_exit_code(monkeypatch, capsys):
    code, text = made(monkeypatch, capsys, {"one": lambda: "fine", "two": failed})
    assert code == 1
    assert "FAILED  two" in text
    assert "line 3: wrong" in text
    assert text.endswith("1 passed, 1 failed, 0 not made\n")


def test_tool_that_is_not_there_is_named_and_fails_only_if_all_are_wanted(monkeypatch, capsys):
    code, text = made(monkeypatch, capsys, {"one": lambda: "fine", "two": absent})
    assert code == 0
    assert "ABSENT  two" in text
    assert "tool is not installed (from there)" in text
    assert made(monkeypatch, capsys, {"two": absent}, "--all")[0] == 1


def test_program_that_ends_badly_is_a_failure_with_its_words():
    with pytest.raises(check.Failed, match="no such thing"):
        check.run("sh", "-c", "echo no such thing >&2; exit 3")
    with pytest.raises(check.Absent, match=r"nothing-of-this-name is not installed \(from there\)"):
        check.tool("nothing-of-this-name", "from there")


@pytest.mark.parametrize(("action", "address"), [("no-op", "a.b"), ("update", "a.b"), ("update", *check._FORGOTTEN)])
def test_what_was_applied_is_planned_again_and_must_not_change(action, address, monkeypatch, tmp_path):
    """Terraform is a stand-in that writes down what it is asked."""
    asked = tmp_path / "asked"
    resources = {"values": {"root_module": {"resources": [{"mode": "managed"}]}}}
    again = {"resource_changes": [{"address": address, "change": {"actions": [action]}}]}
    terraform = tmp_path / "terraform"
    terraform.write_text(
        f"""#!/bin/sh
echo "$2 $4" >>{asked}
echo "Warning: a file of settings is missing" >&2
case "$2 $4" in
"show again.tfplan") echo '{json.dumps(again)}' ;;
show*) echo '{json.dumps(resources)}' ;;
destroy*) echo "Destroy complete! Resources: 1 destroyed." ;;
esac
"""
    )
    terraform.chmod(0o755)
    monkeypatch.setattr(check, "tool", lambda name, source: name)
    monkeypatch.setattr(check, "_initialised", lambda: contextlib.nullcontext((terraform, tmp_path)))
    monkeypatch.setattr(check, "_served", lambda moto: contextlib.nullcontext("http://127.0.0.1:1"))
    if action == "update" and address == "a.b":
        with pytest.raises(check.Failed, match=r"second plan is not empty: it would change a\.b"):
            check.terraform_apply()
    else:
        assert check.terraform_apply().startswith("1 resources made, planned again without a change")
    steps = [line.split()[0] for line in asked.read_text().splitlines()]
    assert steps[:3] == ["apply", "plan", "show"]


def test_schema_refuses_a_key_that_nobody_knows_at_any_depth():
    import jsonschema

    pod = {"type": "object", "properties": {"cpu": {"x-kubernetes-int-or-string": True, "type": "integer"}}}
    free = {"type": "object", "properties": {}, "x-kubernetes-preserve-unknown-fields": True}
    schema = check._strict({"type": "object", "properties": {"pods": {"type": "array", "items": pod}, "free": free}})
    validator = jsonschema.Draft7Validator(schema)
    assert validator.is_valid({"pods": [{"cpu": "500m"}], "free": {"anything": 1}})
    assert not validator.is_valid({"pods": [{"cpus": 1}]})


def test_manifests_and_their_pods_are_found():
    kinds = [item["kind"] for _, item in check.documents()]
    assert {"RayCluster", "RayJob", "RayService", "NetworkPolicy"} <= set(kinds)
    pods = [pod for _, item in check.documents() for pod in check.pod_templates(item)]
    assert len(pods) >= 10
