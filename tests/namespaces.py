"""A program again in namespaces of its own: it sees no process, address or Ray of the host, and nothing outlives it."""

import os
import shutil
import subprocess
import sys
import tempfile

_INSIDE = "RAYSTILL_INSIDE_NAMESPACES"
_ENTER = 'ip link set lo up && mkdir -p /tmp/ray && mount --bind "$RAY_DIRECTORY" /tmp/ray && exec "$0" "$@"'


def possible() -> bool:
    return os.geteuid() == 0 and all(shutil.which(name) for name in ("unshare", "setpriv", "ip", "mount"))


def enter(module: str, needed: bool = True) -> None:
    """Starts `python -m module` with the same arguments in there and exits with its code; returns when it is there.

    Args:
        module: the program.
        needed: whether it must not run outside; without, it goes on here where namespaces cannot be made.
    """
    if _INSIDE in os.environ:
        return
    if not possible():
        if needed:
            raise SystemExit(f"{module} runs in namespaces of its own: it needs root, unshare, ip and mount")
        return
    with tempfile.TemporaryDirectory(prefix="raystill-ray-") as directory:
        apart = ["unshare", "--net", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
        words = [*apart, "sh", "-c", _ENTER, sys.executable, "-m", module, *sys.argv[1:]]
        environment = {**os.environ, _INSIDE: "1", "RAY_DIRECTORY": directory}
        raise SystemExit(subprocess.run(words, env=environment).returncode)
