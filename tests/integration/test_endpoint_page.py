"""The page at `/` in headless Chromium, served by a real HTTP server with a tiny model behind it."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.api_keys import create_key, opened_keys
from services.endpoint import keys, teacher
from services.endpoint.api import build_api
from services.endpoint.client import ask
from services.endpoint.fixed import FixedModel
from services.endpoint.following import ChampionFollower, verified
from services.endpoint.metrics import RouterMetrics
from services.endpoint.model import Piece, ServedModel
from services.endpoint.router import Router, put_router_into
from services.endpoint.schema import DirectoryArguments, EndpointArguments
from services.endpoint.teacher import Teacher
from services.endpoint.traffic import Reign, Route, RoutingTable
from services.endpoint.versions import Version
from tests.endpoint_models import crown_version, publish_version, save_version
from tests.local_http import served
from tests.running_endpoint import wait_until

pytestmark = pytest.mark.integration

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra dev)")
expect = sync_api.expect
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)

MODEL = "tiny-student"
PROMOTED_AT = "2026-01-02T03:04:05+00:00"
EVIL = '<script>window.pwned = 1</script><img src=x onerror="window.pwned = 2"></pre><b>bold</b>'
TRAFFIC = [
    {
        **{
            "version": "7",
            "alias": "champion",
            "share": 0.9,
            "scheme": "int8_weight_only",
            "requests": 1200,
            "errors": 0,
        },
        **{"ttft_p50_s": 0.021, "ttft_p99_s": 0.18, "tokens_per_s": 412.0},
    },
    {
        **{"version": "8", "alias": "challenger", "share": 0.1, "scheme": "onnx_int8", "requests": 131, "errors": 2},
        **{"ttft_p50_s": 0.034, "ttft_p99_s": 0.31, "tokens_per_s": 288.4},
    },
    {
        **{"version": EVIL, "alias": "teacher", "share": 0, "scheme": "float", "requests": 0, "errors": 0},
        **{"ttft_p50_s": None, "ttft_p99_s": None, "tokens_per_s": None},
    },
]


@dataclass
class Site:
    url: str
    database: str
    follower: ChampionFollower


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(keys, "POLL_S", 0.1)
    database = f"sqlite:///{tmp_path}/champions.db"
    crown_version(database, MODEL, "1", *publish_version(tmp_path / "local", tmp_path / "storage", "1", seed=0))
    arguments = EndpointArguments(model_name=MODEL, database=database, max_new_tokens=64)
    follower = ChampionFollower(MODEL, database, verified(lambda directory: ServedModel(directory, 200, 64)))
    follower.poll()
    with served(build_api(arguments, follower)) as url:
        yield Site(url, database, follower)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (Debian's package chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        expect.set_options(timeout=20_000)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens the page; at the end, that it asked nobody else and had no error in its script."""
    contexts, problems, hosts = [], [], set()

    def open_one(**options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
        contexts.append(context)
        opened = context.new_page()
        opened.set_default_timeout(15_000)
        opened.on("pageerror", lambda error: problems.append(str(error)))
        opened.on("console", lambda said: problems.append(said.text) if "Content Security" in said.text else None)
        opened.on("request", lambda request: hosts.add(request.url.split("/", 3)[2]))
        return opened

    yield open_one
    for context in contexts:
        context.close()
    assert problems == []
    assert len(hosts) <= 1


def with_traffic(opened: Any, versions: list[dict[str, Any]], canary: dict[str, Any] | None = None) -> list[str]:
    """Answers for the versions' figures, and lets the one model answer for all aliases; the models that are asked."""
    asked: list[str] = []

    def as_the_one_model(route: Any) -> None:
        body = json.loads(route.request.post_data)
        asked.append(body["model"])
        route.continue_(post_data=json.dumps({**body, "model": MODEL}))

    def as_of_now(route: Any) -> None:
        figures.append(len(figures) % 5)
        now = [
            {**version, "ttft_p50_s": version["ttft_p50_s"] and version["ttft_p50_s"] * (1 + figures[-1] / 9)}
            for version in versions
        ]
        route.fulfill(json={"versions": now, "canary": canary})

    figures: list[int] = []
    opened.route("**/v1/raystill/traffic", as_of_now)
    opened.route("**/v1/completions", as_the_one_model)
    opened.route("**/v1/chat/completions", as_the_one_model)
    return asked


def test_page_shows_the_champion_and_its_answer(site: Site, open_page: Callable[..., Any]) -> None:
    opened = open_page()
    assert opened.goto(site.url).status == 200
    opened.wait_for_selector("#versions tr")
    assert opened.text_content("h1") == MODEL
    assert opened.text_content("#state") == "serving"
    assert opened.text_content("#versions tr").startswith("1champion100 %")
    opened.fill("#prompt", "the cat <b>")
    opened.fill("#tokens", "24")
    opened.click("#ask")
    expect(opened.locator(".figures")).to_contain_text("tokens/s")
    assert opened.text_content("article pre") == "the cat <b>" + ask(site.url, MODEL, "the cat <b>", 24)
    assert "24 tokens" in opened.text_content(".figures")
    opened.select_option("#kind", "chat")
    opened.click("#ask")
    expect(opened.locator("article pre .asked")).to_have_count(0)  # a chat's answer does not go on with the prompt
    expect(opened.locator(".figures")).to_contain_text("first token after")


def test_page_asks_for_the_key_and_keeps_it_in_memory(site: Site, open_page: Callable[..., Any]) -> None:
    with opened_keys(site.database) as engine:
        _, key = create_key(engine, "alice")
    opened = open_page()
    wait_until(lambda: opened.goto(site.url).status == 401)  # the key is known
    opened.wait_for_selector("#key-input")
    assert opened.is_hidden("#try")
    assert opened.is_hidden("#traffic")
    opened.fill("#key-input", "rs-wrong")
    opened.press("#key-input", "Enter")
    expect(opened.locator("#key-why")).to_contain_text("not accepted")
    opened.fill("#key-input", key)
    opened.press("#key-input", "Enter")
    opened.wait_for_selector("#try:not([hidden])")
    opened.click("#ask")
    expect(opened.locator(".figures")).to_contain_text("tokens/s")
    assert key not in opened.content()
    kept = opened.evaluate("[document.cookie, localStorage.length, sessionStorage.length, location.href]")
    assert kept == ["", 0, 0, f"{site.url}/"]
    opened.click("#forget")
    opened.wait_for_selector("#key:not([hidden])")
    assert opened.input_value("#key-input") == ""


def test_page_asks_all_versions_side_by_side(site: Site, open_page: Callable[..., Any]) -> None:
    opened = open_page()
    asked = with_traffic(opened, TRAFFIC, {"version": "8", "state": "it is starting"})
    opened.goto(site.url)
    opened.wait_for_selector("article.teacher")
    assert opened.locator("article").count() == 3
    opened.click("#ask")
    expect(opened.locator("#said")).to_have_text("all answers are there")
    assert sorted(asked) == [f"{MODEL}@{alias}" for alias in ("challenger", "champion", "teacher")]
    assert all("tokens/s" in text for text in opened.locator(".figures").all_text_contents())
    boxes = [opened.locator(f"article.{alias}").bounding_box() for alias in ("champion", "challenger", "teacher")]
    assert boxes[0]["x"] < boxes[1]["x"] < boxes[2]["x"]
    assert len({box["y"] for box in boxes}) == 1
    rows = opened.locator("#versions tr").all_text_contents()
    assert "90 %" in rows[0]
    assert "180 ms" in rows[0]
    assert "288" in rows[1]
    assert opened.locator("#charts svg").count() == 3
    assert opened.text_content("#canary:not([hidden])") == "Canary, version 8: it is starting"


@contextmanager
def champion_challenger_and(teacher_url: str, directory: Path) -> Iterator[tuple[str, Router]]:
    """A router in front of two real versions, with a teacher to ask; its URL."""
    database = f"sqlite:///{directory}/champions.db"
    fields = {"max_context_tokens": 200, "max_new_tokens": 64, "threads_per_replica": 1, "teacher_url": teacher_url}
    arguments = EndpointArguments(model_name=MODEL, database=database, **fields)
    replicas, routes = {}, []
    for number in ("7", "8"):
        uri, digest = publish_version(directory / number, directory / "storage", number, seed=int(number))
        artefact = {"model_name": MODEL, "epoch": 0, "version": number, "uri": uri, "manifest_sha256": digest}
        route = Route(f"v{number}", number, digest, uri, "float", 200, 64)
        replicas[route.app] = Version.func_or_class(arguments.model_dump(), {**artefact, "promoted_at": PROMOTED_AT})
        routes.append(route)
    router = Router(arguments, lambda route: replicas[route.app], RouterMetrics(MODEL), Teacher(arguments))
    router.table = RoutingTable(1, routes[0], Reign(1, PROMOTED_AT), routes[1], (1, 0), share=0.1, problem=None)
    router.traffic |= {"versions": TRAFFIC[:2], "teacher": {"requests": 3, "errors": 0, "ttft_p50_s": 0.09}}
    with served(put_router_into(build_api(arguments, router, place="front"), router)) as url:
        yield url, router


def test_page_asks_the_teacher_beside_champion_and_challenger(
    open_page: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher, "_FRESH_S", 0.2)
    save_version(tmp_path / "teacher", seed=5)
    fields = {"directory": str(tmp_path / "teacher"), "max_new_tokens": 64, "max_context_tokens": 400}
    plain = DirectoryArguments(model_name="big-teacher", **fields)
    with ExitStack() as up, champion_challenger_and("http://127.0.0.1:9", tmp_path) as (url, router):
        opened = open_page()
        opened.goto(url)
        figures = opened.locator("article.teacher .figures")
        expect(figures).to_have_text("not up: nothing answers at serve.teacher_url")
        assert opened.text_content("article.teacher h3") == "teacher"
        colors = opened.evaluate(
            "['.figures', '#problem'].map((x) => getComputedStyle(document.querySelector(x)).color)"
        )
        assert figures.evaluate("(element) => getComputedStyle(element).color") == colors[1] != colors[0]
        opened.click("#ask")
        expect(opened.locator("#said")).to_have_text("all answers are there")
        assert opened.text_content("article.teacher pre") == "", "it was not asked"
        teacher_url = up.enter_context(served(build_api(plain, FixedModel(plain))))
        router._teacher = Teacher(router._arguments.replace(teacher_url=teacher_url))
        expect(figures).to_have_text("not asked yet")
        assert opened.text_content("article.teacher h3") == "teacher: big-teacher"
        assert opened.locator("#versions tr").all_text_contents()[2].startswith("big-teacherteacher––3090 ms")
        for kind in ("chat", "text"):
            opened.select_option("#kind", kind)
            opened.click("#ask")
            expect(opened.locator("#said")).to_have_text("all answers are there")
            shown = opened.locator(".figures").all_text_contents()
            assert all("tokens/s" in text and "first token after" in text for text in shown), shown
        texts = opened.locator("article pre").all_text_contents()
        prompt = opened.input_value("#prompt")
        asked = [(url, f"{MODEL}@champion"), (url, f"{MODEL}@challenger"), (teacher_url, "big-teacher")]
        assert texts == [prompt + ask(base, model, prompt, 64) for base, model in asked]
        opened.screenshot(path=tmp_path / "three.png", full_page=True)


def test_page_shows_markup_of_models_and_names_as_text(site: Site, open_page: Callable[..., Any]) -> None:
    class Evil:
        """An answer of a model that writes markup."""

        def __init__(self, *_: Any) -> None:
            self._items = iter([3, Piece(0, EVIL, num_sampled=3), Piece(0, "", num_sampled=1, finish_reason="stop")])

        async def __anext__(self) -> Any:
            for item in self._items:
                return item
            raise StopAsyncIteration

        def __aiter__(self) -> "Evil":
            return self

        def cancel(self) -> None:
            pass

    assert site.follower.served is not None
    site.follower.served.model.submit = Evil  # type: ignore[assignment,method-assign]
    opened = open_page()
    with_traffic(opened, [{**version, "scheme": EVIL} for version in TRAFFIC], {"version": EVIL, "state": EVIL})
    opened.goto(site.url)
    opened.wait_for_selector("article.teacher")
    opened.fill("#prompt", EVIL)
    opened.click("#ask")
    expect(opened.locator("#said")).to_have_text("all answers are there")
    assert opened.locator("article pre").all_text_contents() == [EVIL + EVIL] * 3
    assert EVIL in opened.locator("#versions tr").all_text_contents()[2]
    assert opened.text_content("#canary") == f"Canary, version {EVIL}: {EVIL}"
    assert opened.evaluate("window.pwned") is None
    assert opened.locator("main img, main b, main script").count() == 0


def test_page_says_why_there_is_no_answer(site: Site, open_page: Callable[..., Any]) -> None:
    opened = open_page()
    opened.goto(site.url)
    opened.wait_for_selector("#versions tr")
    opened.fill("#prompt", "x " * 400)
    opened.click("#ask")
    expect(opened.locator(".figures")).to_contain_text("400: ")
    assert "context is 200 tokens" in opened.text_content(".figures")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_page_fits_and_can_be_read(
    site: Site, open_page: Callable[..., Any], scheme: str, width: int, tmp_path: Path
) -> None:
    opened = open_page(color_scheme=scheme, viewport={"width": width, "height": 900})
    opened.clock.install()
    with_traffic(opened, TRAFFIC[:2])
    opened.goto(site.url)
    opened.wait_for_selector("article.challenger")
    opened.click("#ask")
    expect(opened.locator("#said")).to_have_text("all answers are there")
    for _ in range(12):
        opened.clock.run_for(2000)  # a look at the figures
        opened.wait_for_timeout(30)
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.evaluate("document.querySelector('.wide').scrollWidth") <= width
    opened.screenshot(path=tmp_path / "page.png", full_page=True)
    assert opened.evaluate(Path(__file__).with_name("contrasts.js").read_text()) == []
    unnamed = opened.evaluate(
        "[...document.querySelectorAll('input, select, textarea')].filter((x) => !x.labels.length).length"
    )
    assert unnamed == 0
