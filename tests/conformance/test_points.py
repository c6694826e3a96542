"""The count of the checklist itself: every point has a test, and none is counted that did not pass."""

import re
from pathlib import Path

import pytest

from tests.conformance import points
from tests.conformance.clients import CLIENTS
from tests.conformance.points import NUM_POINTS, note, summary


def test_every_point_has_a_test() -> None:
    sources = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    named = {int(number) for number in re.findall(r"^def test_(\d\d)_", sources, re.MULTILINE)}
    assert named == set(range(1, NUM_POINTS + 1))


def test_point_is_counted_where_all_its_tests_passed() -> None:
    results: dict[str, dict[int, bool]] = {}
    for test, when, passed in (
        ("test_a.py::test_01_x[openai]", "call", True),
        ("test_a.py::test_01_x[langchain]", "call", True),
        ("test_a.py::test_01_y", "setup", True),
        ("test_a.py::test_01_y", "call", True),
        ("test_b.py::test_02_x[openai-more]", "call", True),
        ("test_b.py::test_02_y[openai]", "call", False),
        ("test_b.py::test_03_x[127.0.0.1]", "setup", False),
        ("test_b.py::test_every_point", "call", False),
    ):
        note(results, f"tests/conformance/{test}", when, passed)
    note(results, "tests/unit/test_a.py::test_04_x", "call", True)
    assert results == {"raw": {1: True, 3: False}, "openai": {1: True, 2: False}, "langchain": {1: True}}
    lines = [" ".join(line.split()) for line in summary(results)]
    assert lines == [
        "raw 1 / 2 failed: 3",
        "openai 1 / 2 failed: 2",
        "openai_async 0 / 0",
        "langchain 1 / 1",
        "all 1 / 47",
    ]


def test_count_is_printed_by_whoever_prints(request: pytest.FixtureRequest) -> None:
    """The process that prints knows `tests/conftest.py` alone."""
    assert request.config.pluginmanager.has_plugin(points.__name__)
    assert tuple(CLIENTS) == points.CLIENTS
