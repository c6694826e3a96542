"""The rules that keep the rooms apart: who imports whom, what is light, and that importing does nothing."""

import ast
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.__main__ import app

ROOT = Path(__file__).parents[2]
ROOMS = ("cluster", "services", "jobs")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for room in ROOMS
    for path in sorted((ROOT / room).rglob("*.py"))
}
LIGHT = sorted(
    {"cluster.config", "cluster.errors", "cluster.resources", "cluster.logs", "cluster.storage", "cluster.published"}
    | {"cluster.encoder_texts"}
    | {"cluster.s3", "cluster.multipart", "cluster.attempts", "cluster.api_keys", "jobs.keys"}
    | {"cluster.connection", "cluster.pretrained", "cluster.tracking", "cluster.champions"}
    | {"cluster.promotions", "cluster.processes", "cluster.registry", "cluster.names", "jobs.gate", "jobs.rollback"}
    | {"jobs.config", "jobs.ledger", "jobs.training.plan", "jobs.training.choice", "jobs.training.objective"}
    | {
        "cluster.model_directory",
        "services.endpoint.encoder_schema",
        "services.endpoint.openapi",
        "jobs.serve_directory",
    }
    | {"jobs.__main__", "jobs.evaluating.compression", "jobs.evaluating.questions"}
    | {"cluster.canaries", "cluster.crowning"}
    | {f"services.endpoint.{name}" for name in ("canary", "following", "supervisor", "traffic")}
    | {name for name in MODULES if re.fullmatch(r"services\.\w+\.(schema|signals|packing|client)", name)}
)
"""These import neither torch nor ray when they are imported."""
NUMERIC = sorted(
    {
        "cluster.language_model",
        "jobs.scoring",
        "jobs.evaluating.quality",
        "jobs.training.losses",
        "jobs.training.data",
        "jobs.training.initial",
    }
    | {name for name in MODULES if name.startswith("jobs.training.targets")}
    | {"services.teacher.scoring", "services.teacher.model", "services.endpoint.model", "services.endpoint.decoding"}
    | {name for name in MODULES if name.startswith("services.endpoint.engines")}
    | {"services.endpoint.encoders", "services.endpoint.encoder_weights"}
)
"""These know torch and not Ray, not even inside a function."""
COMMANDS = [item.name or item.callback.__name__ for item in app.registered_commands]


def imports_of(source, module):
    """All `(module, at_the_top)` of a source text; `from a import b` counts as `a.b` where that is a module."""
    tree = ast.parse(source)
    lazy = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for inner in ast.walk(outer)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [item.name for item in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")[: -node.level]
                base = ".".join([*package, *filter(None, [base])])
            names = [f"{base}.{item.name}" if f"{base}.{item.name}" in MODULES else base for item in node.names]
        else:
            continue
        for name in names:
            yield name, id(node) not in lazy


IMPORTS = {name: list(imports_of(path.read_text(encoding="utf-8"), name)) for name, path in MODULES.items()}


def broken(rule):
    """`module -> imported` for every import between modules that the rule `(module, imported, at_the_top)` forbids."""
    return sorted(
        f"{module} -> {imported}"
        for module, found in IMPORTS.items()
        for imported, at_the_top in found
        if rule(module, imported, at_the_top)
    )


def room(module):
    return module.split(".")[0]


def service(module):
    parts = module.split(".")
    return (parts[1], parts[2]) if parts[0] == "services" and len(parts) > 2 else (None, None)


def is_a(module, *packages):
    return any(module == package or module.startswith(f"{package}.") for package in packages)


# --- who imports whom -------------------------------------------------------------------------------------------------


def test_imports_reader_sees_every_form():
    source = (
        "import ray.serve as s\nfrom services.teacher import model\nfrom . import ledger\nfrom jobs.config import X\n"
        "def f():\n    import torch\n    from services.teacher.deployment import app\n"
    )
    assert list(imports_of(source, "jobs.run")) == [
        ("ray.serve", True),
        ("services.teacher.model", True),
        ("jobs.ledger", True),
        ("jobs.config", True),
        ("torch", False),
        ("services.teacher.deployment", False),
    ]
    assert len(MODULES) > 40
    assert sum(map(len, IMPORTS.values())) > 200


def test_imports_cluster_imports_no_other_room():
    assert not broken(lambda module, imported, _: room(module) == "cluster" and is_a(imported, "services", "jobs"))


def test_imports_services_import_no_jobs():
    assert not broken(lambda module, imported, _: room(module) == "services" and is_a(imported, "jobs"))


def test_imports_jobs_know_only_records_and_client_of_a_service():
    def wrong(module, imported, _):
        return (
            room(module) == "jobs"
            and is_a(imported, "services")
            and service(imported)[1] not in ("schema", "signals", "packing", "client")
        )

    assert not broken(wrong)


def test_imports_nothing_imports_tests_or_infra():
    assert not broken(lambda module, imported, _: is_a(imported, "tests", "infra"))


def test_imports_services_do_not_know_each_other():
    def wrong(module, imported, _):
        mine, other = service(module)[0], service(imported)[0]
        return mine is not None and other is not None and mine != other

    assert not broken(wrong)


def test_imports_inside_a_service_point_one_way():
    forbidden = {
        "packing": {"signals", "schema", "scoring", "model", "deployment", "client"},
        "signals": {"schema", "scoring", "model", "deployment", "client"},
        "schema": {"scoring", "model", "deployment", "client"},
        "scoring": {"model", "deployment", "client"},
        "errors": {"schema", "model", "deployment", "client"},
        "model": {"deployment", "client"},
        "deployment": {"client"},
        "client": {"model", "deployment"},
    }

    def wrong(module, imported, at_the_top):
        if service(module)[0] is None or service(imported)[0] is None:
            return False
        mine, other = service(module)[1], service(imported)[1]
        if mine == "client" and other in ("deployment", "versions") and not at_the_top:
            return False  # who starts a service builds its application, inside the function that starts it
        return other in forbidden.get(mine, {"client"} if mine != "client" else set())

    assert not broken(wrong)


@pytest.mark.parametrize("module", NUMERIC)
def test_imports_numeric_files_know_nothing_of_ray(module):
    assert not [imported for imported, _ in IMPORTS[module] if is_a(imported, "ray")]


@pytest.mark.parametrize("module", LIGHT)
def test_imports_light_files_name_neither_torch_nor_ray_at_the_top(module):
    heavy = [imported for imported, top in IMPORTS[module] if top and is_a(imported, "torch", "ray", "transformers")]
    assert not heavy


def test_imports_light_files_bring_neither_torch_nor_ray_along(tmp_path):
    code = (
        "import importlib, json, sys\n"
        f"for name in {LIGHT!r}:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'torch', 'ray', 'transformers', 'mlflow'} & sys.modules.keys()\n"
        "    assert not heavy, (name, heavy)\n"
    )
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


def test_importing_all_modules_does_nothing(tmp_path):
    here, home, scratch = (tmp_path / name for name in ("here", "home", "scratch"))
    for path in (here, home, scratch):
        path.mkdir()
    code = (
        "import importlib, json, os, sys, threading\n"
        f"for name in {sorted(MODULES)!r}:\n"
        "    importlib.import_module(name)\n"
        "import ray\n"
        "print(json.dumps({'ray': ray.is_initialized(), 'threads': [t.name for t in threading.enumerate()]}))\n"
    )
    done = python(code, here, HOME=str(home), TMPDIR=str(scratch))
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ray"] is False
    known = ("tracking", "progress", "supervisor", "router-exchange", "api-keys", "engine")
    ours = [name for name in found["threads"] if name in known]
    assert not ours
    for path in (here, scratch):
        assert not list(path.rglob("*"))
    mine = [path for path in home.rglob("*") if "raystill" in path.name or "mlruns" in path.name]
    assert not mine


# --- the command line -------------------------------------------------------------------------------------------------


def test_help_is_there_for_every_command(command, tmp_path):
    assert {"run", "prepare", "train", "evaluate", "quantize", "register", "promote", "serve", "status"} <= {*COMMANDS}
    assert {"rollback", "versions"} <= {*COMMANDS}
    done = subprocess.run([*command, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    for name in COMMANDS:
        assert re.search(rf"^ +{name} ", done.stdout, re.MULTILINE), name


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_says_what_it_does(command, tmp_path, name):
    done = subprocess.run([*command, name, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    assert "Usage:" in done.stdout
    assert not done.stderr
    callback = next(item.callback for item in app.registered_commands if name in (item.name, item.callback.__name__))
    assert " ".join(callback.__doc__.split())[:40] in " ".join(done.stdout.split())


def children_cpu_s():
    """Processor time of finished child processes: unlike the time on the wall it does not grow with the load."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["status", "--help"]], ids=" ".join)
def test_help_answers_at_once(command, tmp_path, arguments):
    best = 9.0
    for attempt in range(6):
        started = children_cpu_s()
        subprocess.run([*command, *arguments], cwd=tmp_path, capture_output=True, check=True)
        best = min(best, children_cpu_s() - started)
        if attempt >= 2 and best < 0.5:
            break
    assert best < 0.5


# --- the files --------------------------------------------------------------------------------------------------------


def files():
    """All files of the project that are or will be tracked."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def test_files_name_no_directory_of_the_machine_they_were_written_on():
    machine = re.compile(rb"(?<![\w.$}-])/(work|root)/")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in files()
        for number, line in enumerate(path.read_bytes().splitlines(), 1)
        if machine.search(line)
    ]
    assert not found


def test_files_stay_readable_in_one_sitting():
    python_files = [path for path in files() if path.suffix == ".py"]
    assert len(python_files) > 60
    long = {str(path.relative_to(ROOT)): count for path in python_files if (count := len(lines(path))) > 450}
    assert not long


def test_modules_say_why_they_exist():
    silent = [
        name for name, path in MODULES.items() if lines(path) and ast.get_docstring(ast.parse(text(path))) is None
    ]
    assert not silent


def lines(path):
    return text(path).splitlines()


def text(path):
    return path.read_text(encoding="utf-8")


def python(code, directory, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
    )
