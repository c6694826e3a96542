"""Endpoints and clients of the conformance tests, and the count of what passed, which is printed at the end.

A test is named `test_NN_...` after its point of the checklist. A point holds for a client if every test of it with that
client passed; tests without a client speak HTTP themselves and count as raw.
"""

import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conformance.clients import CLIENTS
from tests.conformance.server import Endpoint, endpoint
from tests.encoder_models import save_classifier, save_encoder
from tests.endpoint_models import save_version
from tests.scripted_models import OPENED_TEMPLATE, THINKER, THINKING_TEMPLATE, save_scripted, text_chain

NUM_POINTS = 47
_results: dict[str, dict[int, bool]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    found = re.search(r"tests/conformance/test_\w+\.py::test_(\d\d)_\w+(?:\[(\w+))?", report.nodeid)
    if not found or (report.when != "call" and report.passed):
        return
    client = found[2] if found[2] in CLIENTS else "raw"
    points = _results.setdefault(client, {})
    points[int(found[1])] = points.get(int(found[1]), True) and report.passed


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _results:
        return
    terminalreporter.section("OpenAI conformance: points passed of those that apply to the client")
    for client in CLIENTS:
        points = _results.get(client, {})
        failed = ", ".join(str(point) for point, passed in sorted(points.items()) if not passed)
        line = f"{client:13} {sum(points.values()):3} / {len(points)}"
        terminalreporter.write_line(line + (f"   failed: {failed}" if failed else ""))
    every = {point for points in _results.values() for point in points}
    good = {point for point in every if all(points.get(point, True) for points in _results.values())}
    terminalreporter.write_line(f"{'all':13} {len(good):3} / {NUM_POINTS}")


@pytest.fixture(scope="module", autouse=True)
def _small(one_thread: None) -> None:
    """Every model here is tiny."""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """A random Llama: whatever bytes it says."""
    directory = tmp_path_factory.mktemp("tiny")
    save_version(directory)
    limits = {"max_context_tokens": 256, "max_new_tokens": 64, "max_choices": 8, "max_body_bytes": 1 << 16}
    with endpoint("tiny", directory, **limits) as running:
        yield running


@pytest.fixture(scope="session")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """The same with room for answers that take seconds."""
    directory = tmp_path_factory.mktemp("patient")
    save_version(directory)
    with endpoint("patient", directory, max_context_tokens=500, max_new_tokens=400) as running:
        yield running


@pytest.fixture(scope="session")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """Thinks ` why not` in a block of its own, answers `So yes`."""
    directory = tmp_path_factory.mktemp("thinker")
    save_scripted(directory, THINKER, THINKING_TEMPLATE)
    with endpoint("thinker", directory) as running:
        yield running


@pytest.fixture(scope="session")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """The template opens the block; the model writes `ab`, the end tag letter by letter, and answers `Yo`."""
    directory = tmp_path_factory.mktemp("opened")
    save_scripted(directory, text_chain("\n", "ab</think>Yo"), OPENED_TEMPLATE)
    with endpoint("opened", directory) as running:
        yield running


@pytest.fixture(scope="session")
def polyglot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """Says `é猫🐈!` byte by byte."""
    directory = tmp_path_factory.mktemp("polyglot")
    save_scripted(directory, text_chain(":", "é猫🐈!"))
    with endpoint("polyglot", directory) as running:
        yield running


@pytest.fixture(scope="session")
def breaking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """Says `ab` and then gives logits that are not numbers."""
    directory = tmp_path_factory.mktemp("breaking")
    save_scripted(directory, {":": "a", "a": "b"}, poison="b")
    with endpoint("breaking", directory) as running:
        yield running


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    directory = tmp_path_factory.mktemp("encoder")
    save_encoder(directory, {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True}, normalise=True)
    with endpoint("encoder", directory) as running:
        yield running


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    directory = tmp_path_factory.mktemp("classifier")
    save_classifier(directory)
    with endpoint("classifier", directory) as running:
        yield running


@pytest.fixture
def connect() -> Iterator[Any]:
    """Makes clients: `connect("openai", endpoint)`."""
    made: list[Any] = []

    def connect(name: str, running: Endpoint, **options: Any) -> Any:
        made.append(CLIENTS[name](running.url, **options))
        return made[-1]

    yield connect
    for client in made:
        client.close()
