"""This machine: versions of what is installed, room on its disk and in shared memory, its GPUs.

Runs on any node of a cluster too (it is sent there as a task), so that nodes can be compared.
"""

import contextlib
import importlib.metadata
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion

from jobs.examining.check import Check

COMPARED = ("ray", "torch", "transformers", "torchao", "tokenizers", "mlflow", "numpy", "pyarrow")
"""Packages in which nodes must not differ: what one writes another reads, or they decide numbers."""
_PYTHON = SpecifierSet(">=3.11")
_LEAST_DISK_GB, _LITTLE_DISK_GB = 2.0, 20.0
_CONSTRAINTS = Path(__file__).parents[2] / "infra" / "constraints.txt"


def versions() -> dict[str, str]:
    """Python and the compared packages, as they are installed here; one that is missing is left out."""
    found = {"python": platform.python_version()}
    for name in COMPARED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def wanted_versions(constraints: Path = _CONSTRAINTS) -> dict[str, SpecifierSet]:
    """What raystill was tested with: `infra/constraints.txt` of a checkout, else what the package asks for."""
    lines: list[str] = []
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        lines += importlib.metadata.requires("raystill") or []
    if constraints.is_file():
        lines += constraints.read_text(encoding="utf-8").splitlines()
    wanted: dict[str, SpecifierSet] = {}
    for line in lines:
        text = re.sub(r"\s+#.*|^#.*", "", line).strip()
        with contextlib.suppress(InvalidRequirement):
            requirement = Requirement(text)
            if requirement.name in COMPARED and not (requirement.marker and "extra" in str(requirement.marker)):
                wanted[requirement.name] = requirement.specifier
    return wanted


def check_versions(where: str, found: dict[str, str], wanted: dict[str, SpecifierSet]) -> Iterator[Check]:
    """Installed versions beside those that raystill was tested with."""
    if found["python"] not in _PYTHON:
        yield Check(where, "python", "failure", found["python"], f"use Python {_PYTHON}")
    else:
        yield Check(where, "python", "ok", found["python"])
    for name, specifier in wanted.items():
        if name not in found:
            yield Check(where, name, "failure", "not installed", f"pip install '{name}{specifier}'")
            continue
        try:
            fits = specifier.contains(found[name], prereleases=True)
        except InvalidVersion:
            fits = False
        status = "ok" if fits else "failure"
        yield Check(where, name, status, found[name], "" if fits else f"pip install '{name}{specifier}'")  # type: ignore[arg-type]


def check_same_versions(here: dict[str, str], where: str, there: dict[str, str]) -> Iterator[Check]:
    """Versions of a node beside those of the machine that asks. Python counts up to its minor version."""

    def compared(found: dict[str, str]) -> dict[str, str]:
        return {**found, "python": ".".join(found.get("python", "").split(".")[:2])}

    mine, other = compared(here), compared(there)
    different = [
        f"{name} {other[name]}, here {mine[name]}" for name in mine if name in other and other[name] != mine[name]
    ]
    if different:
        yield Check(where, "same versions", "failure", "; ".join(different), "use one image, or infra/constraints.txt")
    else:
        yield Check(where, "same versions", "ok", f"{len(other)} as here")


def check_room(where: str, object_store_bytes: float = 0) -> Iterator[Check]:
    """Free bytes where temporary files and spilled objects go, and in shared memory.

    Args:
        object_store_bytes: what Ray's object store wants of shared memory here.
    """
    directory = tempfile.gettempdir()
    free_gb = shutil.disk_usage(directory).free / 1e9
    found = f"{free_gb:,.1f} GB free in {directory}"
    if free_gb < _LEAST_DISK_GB:
        yield Check(where, "disk", "failure", found, f"free {_LEAST_DISK_GB:g} GB, or set TMPDIR to another disk")
    elif free_gb < _LITTLE_DISK_GB:
        yield Check(where, "disk", "warning", found, "models, checkpoints and spilled objects need room: see to 20 GB")
    else:
        yield Check(where, "disk", "ok", found)
    shared = Path("/dev/shm")
    if not shared.is_dir():
        yield Check(where, "shared memory", "warning", "no /dev/shm", "Ray keeps its objects in files, which is slow")
        return
    total = shutil.disk_usage(shared).total
    found = f"{total / 1e9:,.1f} GB in /dev/shm"
    found += f", the object store wants {object_store_bytes / 1e9:,.1f} GB" if object_store_bytes else ""
    if total < object_store_bytes:
        fix = "start the container with a larger --shm-size (Kubernetes: an emptyDir of medium Memory at /dev/shm)"
        yield Check(where, "shared memory", "failure", found, fix)
    else:
        yield Check(where, "shared memory", "ok", found)


def check_gpus(where: str, wanted: float = 0) -> Iterator[Check]:
    """GPUs that the driver shows."""
    cards = list(_gpus())
    found = ", ".join(cards) if cards else "none"
    if wanted > len(cards):
        fix = "see nvidia-smi; in a container the NVIDIA runtime must be on; or set train.use_gpu=false"
        yield Check(where, "GPUs", "failure", f"{found}, the config asks for {wanted:g}", fix)
    else:
        yield Check(where, "GPUs", "ok", found)


def _gpus() -> Iterator[str]:
    import pynvml

    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        try:
            for index in range(pynvml.nvmlDeviceGetCount()):
                card = pynvml.nvmlDeviceGetHandleByIndex(index)
                memory = pynvml.nvmlDeviceGetMemoryInfo(card).total
                yield f"{pynvml.nvmlDeviceGetName(card)} {memory / 2**30:.0f} GiB"
        finally:
            pynvml.nvmlShutdown()
