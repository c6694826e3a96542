"""Makes a small real corpus from what every machine has: the documentation inside Python itself.

The docstrings of the standard library, read through `ast` without importing anything, and the language-reference topics
of `pydoc_data`: about 2.6 MB of technical English with code. One jsonl object per run, `{"text", "source"}` a line.
"""

import ast
import inspect
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from cluster.storage import Storage
from jobs.progress import Bar

_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__"}
_SHORTEST = 20
"""Characters; shorter docstrings say nothing."""


def gather_python_docs(storage: Storage, key: str, bar: Bar) -> dict[str, int]:
    """Writes the corpus as one jsonl object and returns how many documents and bytes it holds."""
    seen: set[str] = set()
    lines = []
    for source, text in bar.over(list(_documents())):
        if len(text) >= _SHORTEST and text not in seen:
            seen.add(text)
            lines.append(json.dumps({"text": text, "source": source}, ensure_ascii=False))
    storage.write(key, ("\n".join(lines) + "\n").encode("utf-8", "replace"))
    return {"documents": len(lines), "bytes": sum(len(text.encode("utf-8", "replace")) for text in seen)}


def _documents() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topic {name}", topics[name].strip()
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED.isdisjoint(relative.parts):
            yield from _docstrings(path, str(relative))


def _docstrings(path: Path, source: str) -> Iterator[tuple[str, str]]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates and deliberate nonsense that ship with Python
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node, clean=False)
            if text:
                yield source, inspect.cleandoc(text)
