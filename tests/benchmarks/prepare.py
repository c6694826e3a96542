"""What preparing costs beside tokenising: `python -m tests.benchmarks.prepare`.

Two processes of one thread take turns on the same source object. One has its texts in memory and does nothing but call
the tokenizer's fastest method and take the ids. The other is what a task of `prepare` does: read and hash all
documents, read them again, tokenise, count bytes, lay rows, write shards with checksums and hashes. The ratio of the
two rates is what a core keeps of the tokenizer's speed.

Then the whole corpus goes through Ray tasks, one a core; the memory of the largest is watched. Half of the corpus is
one object, so memory that grew with an object would show.
"""

import contextlib
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from cluster.connection import ClusterConfig, connect
from cluster.resources import physical_cores
from cluster.storage import open_storage
from jobs.config import DataConfig
from jobs.corpus import find_sources, read_documents
from jobs.gather import _documents
from jobs.prepare import prepare
from tests.benchmarks.sides import OUR_SETTINGS, Side, arguments, show
from tests.unit.test_prepare import NoBar

MODULE = "tests.benchmarks.prepare"
VOCABULARY = 16_384
LENGTH = 1024


def texts_of_python() -> list[str]:
    """Python's documentation, the same documents every time."""
    texts = (text for _, text in _documents() if len(text) >= 20)
    return list(dict.fromkeys(text.encode("utf-8", "ignore").decode() for text in texts))


def salted(texts: list[str]) -> Iterator[bytes]:
    """Lines of jsonl without end: the texts again and again, each time other documents."""
    turn = 0
    while True:
        for number, text in enumerate(texts):
            yield (json.dumps({"text": f"{turn}.{number} {text}"}, ensure_ascii=False) + "\n").encode()
        turn += 1


def make_inputs(directory: Path, size_bytes: int) -> None:
    """A tokenizer and a corpus of one object of half the size, seven of a fourteenth each, and one to take turns on."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = texts_of_python()
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    core.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    )
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=special[0], eos_token=special[0])
    made.save_pretrained(directory / "tokenizer")
    lines = salted(texts)
    for name, share in (("in/0", 1 / 2), *((f"in/{number}", 1 / 14) for number in range(1, 8)), ("turn/0", 1 / 14)):
        path = directory / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as file:
            while file.tell() < min(size_bytes * share, 16e6 if name == "turn/0" else size_bytes):
                file.write(next(lines))


def config_of(directory: Path) -> DataConfig:
    return DataConfig(sources=[str(directory)], sequence_length=LENGTH)


def side(name: str, options: dict[str, Any]) -> Callable[[], dict[str, float]]:
    directory = Path(options["directory"])
    config = config_of(directory / "turn")
    [source] = find_sources(config.sources)
    if name == "tokenizer":
        from cluster.pretrained import load_tokenizer

        core = load_tokenizer(str(directory / "tokenizer")).backend_tokenizer
        batches = [batch.documents for batch in read_documents(source, config)]

        def work(turn: int) -> None:
            for batch in batches:
                for encoding in core.encode_batch_fast(batch, add_special_tokens=False):
                    encoding.ids  # noqa: B018  # whoever tokenises wants them
    else:
        from jobs.preparing.objects import Part, Target, scan_objects, tokenise_objects

        def work(turn: int) -> None:
            target = Target(f"file://{directory}", f"store/{turn}", str(directory / "tokenizer"), config)
            part = Part(0, source, "benchmark")
            if name != "tokenise":
                scan_objects(target, [part], 1, lambda *_: None)
            if name != "scan":
                tokenise_objects(target, [part], 1, lambda *_: None)

    turns = iter(range(10**6))

    def measure() -> dict[str, float]:
        started, used = time.perf_counter(), time.process_time()
        work(next(turns))
        return {"seconds": time.perf_counter() - started, "cpu_s": time.process_time() - used}

    return measure


class Watched(threading.Thread):
    """The most memory that any task's process has had."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_bytes, self.done = 0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.2):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):  # it has ended
                    if "_reporting" in " ".join(process.cmdline()):
                        self.peak_bytes = max(self.peak_bytes, process.memory_info().rss)


def through_ray(directory: Path) -> tuple[float, int, dict[str, Any]]:
    """Seconds for the whole corpus, the peak memory of a task in bytes, and the manifest."""
    config = config_of(directory / "in")
    storage = open_storage(str(directory / "out"))
    watched = Watched()
    with connect(ClusterConfig()):
        watched.start()
        started = time.perf_counter()
        tokenizer = str(directory / "tokenizer")
        sources = find_sources(config.sources)
        manifest = prepare(sources, config, tokenizer, 1, storage, "store/x", NoBar(), physical_cores())
        seconds = time.perf_counter() - started
        watched.done.set()
    return seconds, watched.peak_bytes, manifest


def main() -> None:
    options = arguments(__doc__ or "")
    size_bytes = 100_000_000 if options.quick else 1_000_000_000
    with tempfile.TemporaryDirectory(prefix="raystill-prepare-") as name:
        directory = Path(name)
        make_inputs(directory, size_bytes)
        settings = {**OUR_SETTINGS, "RAYON_NUM_THREADS": "1"}
        sides = [Side(MODULE, side, {"directory": name}, settings) for side in ("tokenizer", "task")]
        cpu: dict[str, list[float]] = {item.name: [] for item in sides}
        for item in sides:
            item.wait_until_ready()
        repeats = options.repeats or (5 if options.quick else 9)
        for turn in range(repeats + 1):
            for item in sides if turn % 2 else reversed(sides):
                item.measure()
                cpu[item.name].append(item.facts["cpu_s"])
        for item in sides:
            del item.seconds[0], cpu[item.name][0]
            item.close()
        megabytes = find_sources([str(directory / "turn")])[0].info.size_bytes / 1e6
        seconds, peak_bytes, manifest = through_ray(directory)
    alone, task = (item.median_s for item in sides)
    rows = [
        [
            item.name,
            f"{megabytes / item.median_s:,.2f}",
            f"{megabytes / statistics.median(cpu[item.name]):,.2f}",
            f"{alone / item.median_s:.2f}",
        ]
        for item in sides
    ]
    total = sum(item["size_bytes"] for item in manifest["sources"]) / 1e6
    rows.append([f"{physical_cores()} Ray tasks, {total:,.0f} MB in all", f"{total / seconds:,.2f}", "", ""])
    rows.append([f"  memory of the largest task, {peak_bytes / 1e6:,.0f} MB", "", "", ""])
    columns = ["one thread", "MB/s", "MB per s of processor", "of the tokenizer"]
    result = {
        "per_core_ratio": alone / task,
        "per_core_ratio_cpu": statistics.median(cpu["tokenizer"]) / statistics.median(cpu["task"]),
        "peak_bytes": peak_bytes,
    }
    show(f"Preparing jsonl, vocabulary of {VOCABULARY:,}, rows of {LENGTH:,} tokens", columns, rows, result)


if __name__ == "__main__":
    main()
