"""Endpoints and clients of the conformance tests; `points` counts what passed."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.conformance.clients import CLIENTS
from tests.conformance.server import Endpoint, endpoint
from tests.encoder_models import save_classifier, save_encoder
from tests.endpoint_models import save_version
from tests.scripted_models import OPENED_TEMPLATE, THINKER, THINKING_TEMPLATE, save_scripted, text_chain


@pytest.fixture(scope="module", autouse=True)
def _small(one_thread: None) -> None:
    """Every model here is tiny."""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """A random Llama: whatever bytes it says."""
    directory = tmp_path_factory.mktemp("tiny")
    save_version(directory, heads=1)  # of a size that vLLM knows as well
    limits = {"max_context_tokens": 256, "max_new_tokens": 64, "max_choices": 8, "max_body_bytes": 1 << 16}
    with endpoint("tiny", directory, **limits) as running:
        yield running


@pytest.fixture(scope="session")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """The same with room for answers that take seconds."""
    directory = tmp_path_factory.mktemp("patient")
    save_version(directory, heads=1)  # of a size that vLLM knows as well
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
    """Makes clients: `connect("openai", endpoint)`, which need only have a `url`."""
    made: list[Any] = []

    def connect(name: str, running: Any, **options: Any) -> Any:
        made.append(CLIENTS[name](running.url, **options))
        return made[-1]

    yield connect
    for client in made:
        client.close()
