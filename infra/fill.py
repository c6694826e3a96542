"""Puts Terraform's outputs into a cluster file: `terraform output -json | python infra/fill.py cluster/aws.yaml`.

A value that is `FILL:name` as a whole becomes the output (a list stays a list), inside a longer text it becomes its
text. Anything left over is a mistake, and nothing is printed then. Needs PyYAML alone.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

_PLACE = re.compile(r"FILL:([a-z_]+)")


def filled(node: Any, values: dict[str, Any]) -> Any:
    """The same tree with every place filled. Raises `KeyError` with the name of a value that is not there."""
    if isinstance(node, dict):
        return {filled(key, values): filled(value, values) for key, value in node.items()}
    if isinstance(node, list):
        return [filled(item, values) for item in node]
    if not isinstance(node, str):
        return node
    whole = _PLACE.fullmatch(node)
    return values[whole[1]] if whole else _PLACE.sub(lambda place: str(values[place[1]]), node)


def main() -> None:
    if len(sys.argv) != 2 or sys.stdin.isatty():
        raise SystemExit("usage: terraform -chdir=infra/terraform output -json | python infra/fill.py cluster/aws.yaml")
    try:
        outputs = {name: item["value"] for name, item in json.load(sys.stdin).items()}
    except (ValueError, TypeError, KeyError):
        raise SystemExit("fill: standard input is not what `terraform output -json` prints; apply first") from None
    cluster = yaml.safe_load(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        text = yaml.safe_dump(filled(cluster, outputs), sort_keys=False, width=1000)
    except KeyError as error:
        raise SystemExit(
            f"fill: {sys.argv[1]} wants {error}, the outputs have {', '.join(sorted(outputs)) or 'nothing'}: "
            "run `terraform apply` with this checkout's configuration"
        ) from None
    print(f"# Made by infra/fill.py from {sys.argv[1]} and Terraform's outputs.\n{text}", end="")


if __name__ == "__main__":
    main()
