"""How many points of the checklist hold, printed at the end of a run. A plugin that `tests/conftest.py` names: where
several processes test, the one that prints reads the conftest of no folder below.

A test is named `test_NN_...` after its point. A point holds for a client if every test of it with that client passed;
tests without a client speak HTTP themselves and count as raw.
"""

import re
from collections.abc import Iterator
from typing import Any

import pytest

NUM_POINTS = 47
CLIENTS = ("raw", "openai", "openai_async", "langchain")
_TEST = re.compile(r"tests/conformance/test_\w+\.py::test_(\d\d)_\w+(?:\[(\w+))?")
_results: dict[str, dict[int, bool]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    note(_results, report.nodeid, report.when, report.passed)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _results:
        terminalreporter.section("OpenAI conformance: points passed of those that apply to the client")
        for line in summary(_results):
            terminalreporter.write_line(line)


def note(results: dict[str, dict[int, bool]], test: str, when: str | None, passed: bool) -> None:
    """Puts how a part of a test ended (its setup, call or teardown) into `results`: by client, then by point."""
    found = _TEST.search(test)
    if not found or (when != "call" and passed):
        return
    points = results.setdefault(found[2] if found[2] in CLIENTS else "raw", {})
    points[int(found[1])] = points.get(int(found[1]), True) and passed


def summary(results: dict[str, dict[int, bool]]) -> Iterator[str]:
    for client in CLIENTS:
        points = results.get(client, {})
        failed = ", ".join(str(point) for point, passed in sorted(points.items()) if not passed)
        line = f"{client:13} {sum(points.values()):3} / {len(points)}"
        yield line + (f"   failed: {failed}" if failed else "")
    every = {point for points in results.values() for point in points}
    good = {point for point in every if all(points.get(point, True) for points in results.values())}
    yield f"{'all':13} {len(good):3} / {NUM_POINTS}"
