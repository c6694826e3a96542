"""The endpoint over HTTP against `transformers serve`: `python -m tests.benchmarks.endpoint`.

Ours is a replica on Ray Serve behind its proxy; what it decodes in float32 is the model's ONNX graph (the scheme
`onnx_float32`, nothing rounded), or with `--torch`, and in bfloat16, the directory as it comes. transformers serves
that directory too, as it comes and with `--continuous-batching`; with `--llama-cpp DIRECTORY`, llama.cpp's
`llama-server` serves the same weights as GGUF. All servers are up at the same time and one is asked at a time, in
turns, by one client: 1 stream, then 16 at once, each of 64 tokens (`--quick`: 32) or as many as the model has to say,
behind a prompt of about 32, greedily. The whole of a stream counts, its first token included. `--ours
'{"replicas": 2}'` gives ours other fields of `serve` than the defaults.
The others are stopped meanwhile, since some of them compute when nobody asks; but for ours, whose Ray would miss it.
"""

import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import track

from cluster.resources import physical_cores
from tests import tiny
from tests.benchmarks.engines import NEW_TOKENS, save_random, save_smollm2
from tests.benchmarks.sides import OUR_SETTINGS, arguments, show

OURS, PLAIN, BATCHING, LLAMA = (
    "raystill",
    "transformers serve",
    "transformers serve, continuous batching",
    "llama-server",
)
STREAMS = (1, 16)
MODEL = "student"


@dataclass
class Server:
    """A server that is up, and what was measured of it by number of streams."""

    name: str
    port: int
    model: str
    process: psutil.Process
    new_tokens: int = NEW_TOKENS
    token_s: dict[int, list[float]] = field(default_factory=lambda: {count: [] for count in STREAMS})
    """Seconds of each turn over the tokens of all its streams."""
    first_s: dict[int, list[float]] = field(default_factory=lambda: {count: [] for count in STREAMS})

    def ms_per_token(self) -> float:
        return statistics.median(self.token_s[1]) * 1000

    def tokens_per_s(self) -> float:
        return 1 / statistics.median(self.token_s[16])


# --- the client ------------------------------------------------------------------------------------------------------


async def ask(server: Server, prompt: str) -> tuple[float, int]:
    """One stream to its end; returns the seconds to its first text, and its tokens.

    Raises:
        RuntimeError: more tokens than asked for, or no stream.
    """
    body = {"model": server.model, "prompt": prompt, "max_tokens": server.new_tokens, "temperature": 0, "stream": True}
    if server.name in (OURS, LLAMA):
        body["stream_options"] = {"include_usage": True}
    if server.name == LLAMA:
        body["cache_prompt"] = False
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1 << 20)
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    received, first_s = bytearray(), None
    while part := await reader.read(1 << 16):
        received += part
        if first_s is None and b"data: " in received:
            first_s = time.perf_counter() - started
    writer.close()
    lines = [line[6:] for line in received.split(b"\n") if line.startswith(b"data: {")]
    usages = [usage for line in lines if (usage := json.loads(line).get("usage"))]
    num_tokens = usages[-1]["completion_tokens"] if usages else 0
    if first_s is None or not 0 < num_tokens <= server.new_tokens:
        raise RuntimeError(f"{server.name}: {bytes(received[-500:])!r}")
    return first_s, num_tokens


async def measure(server: Server, streams: int, turn: int) -> None:
    """One turn: so many streams at once, each with a text of its own."""
    prompts = [" ".join(tiny.sentences(5, seed=1000 * turn + number))[:90] for number in range(streams)]
    started = time.perf_counter()
    answers = await asyncio.gather(*(ask(server, prompt) for prompt in prompts))
    seconds = time.perf_counter() - started
    server.token_s[streams].append(seconds / sum(num_tokens for _, num_tokens in answers))
    server.first_s[streams].append(statistics.median(first_s for first_s, _ in answers))


# --- the servers -----------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def running(name: str, directory: Path, llama_cpp: str | None, work: Path, ours: str = "{}") -> Iterator[Server]:
    """A server in a process of its own; returns when it answers."""
    port = free_port()
    environment = {key: value for key, value in os.environ.items() if key not in OUR_SETTINGS}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(physical_cores())}
    path, model = "/health", str(directory)
    if name == OURS:
        command = [sys.executable, "-m", "tests.benchmarks.endpoint", "--serve", f"{directory}:{work}:{port}"]
        command += ["--ours", ours]
        path, model = "/healthz", MODEL
    elif name == LLAMA:
        from tests.benchmarks.gguf_files import write_gguf

        file = work / "model.gguf"
        write_gguf(directory, file, getattr(torch, json.loads((directory / "config.json").read_text())["dtype"]))
        command = [f"{llama_cpp}/llama-server", "-m", str(file), "--port", str(port), "-np", "16", "-c", "16384"]
        command += ["-t", str(physical_cores()), "--no-webui"]
    else:
        program = Path(sys.executable).parent / "transformers"
        command = [str(program), "serve", str(directory), "--port", str(port), "--device", "cpu", "--dtype", "auto"]
        if name == BATCHING:
            command += ["--continuous-batching", "--cb-num-blocks", "64", "--cb-max-batch-tokens", "512"]
    with (work / f"{port}.log").open("w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + 180
            while not _answers(f"http://127.0.0.1:{port}{path}"):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"{name} does not answer: {log.read()[-2000:]}")
                time.sleep(0.5)
            yield Server(name, port, model, psutil.Process(process.pid))
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


@contextlib.contextmanager
def alone(server: Server, servers: list[Server]) -> Iterator[None]:
    """Stops the other servers for the length of the block, except ours."""
    others = [other for other in servers if other is not server and other.name != OURS]
    processes = [item for other in others for item in (other.process, *other.process.children(recursive=True))]
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def serve(directory: Path, work: Path, port: int, fields: dict[str, Any]) -> None:
    """Our endpoint with the model of a directory as its champion, until it is interrupted."""
    from cluster.connection import ClusterConfig, connect
    from cluster.published import manifest_sha256, publish_directory
    from cluster.storage import open_storage
    from services.endpoint.client import start_endpoint
    from services.endpoint.schema import EndpointConfig
    from tests.endpoint_models import crown_version

    storage, database = open_storage(str(work / "storage")), f"sqlite:///{work}/champions.db"
    scheme = "onnx_float32" if (directory / "model.onnx").is_file() else "float"
    manifest = publish_directory(directory, storage, "versions/1", scheme=scheme)
    crown_version(database, MODEL, "1", f"{storage.uri}/versions/1", manifest_sha256(manifest))
    with connect(ClusterConfig(num_cpus=4, object_store_mb=80)):
        start_endpoint(EndpointConfig(port=port, **fields), MODEL, database, timeout_s=150, blocking=True)


# --- the table -------------------------------------------------------------------------------------------------------


def graph_of(directory: Path, into: Path) -> Path:
    """The directory as the version that is made of it for onnxruntime."""
    from transformers import AutoTokenizer

    from jobs.quantization import onnx_float32

    onnx_float32.quantize(str(directory), into)
    AutoTokenizer.from_pretrained(directory).save_pretrained(into)
    return into


def compare(
    directories: dict[str, Path], repeats: int, new_tokens: int, llama_cpp: str | None, ours: str
) -> list[Server]:
    """All servers, measured in turns, the order turned round every time."""
    with contextlib.ExitStack() as stack:
        servers = []
        for name, directory in directories.items():
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="raystill-bench-")))
            servers.append(stack.enter_context(running(name, directory, llama_cpp, work, ours)))
            servers[-1].new_tokens = new_tokens
        for turn in track(range(repeats + 1), "turns", console=Console(stderr=True)):
            for server in servers if turn % 2 else servers[::-1]:
                with alone(server, servers):
                    for streams in STREAMS:
                        asyncio.run(measure(server, streams, turn))
        for server in servers:
            for times in (*server.token_s.values(), *server.first_s.values()):
                del times[0]  # the turn that warms up
        return servers


def main() -> None:
    def own(parser: Any) -> None:
        parser.add_argument("--llama-cpp", help="directory with llama.cpp's programs")
        parser.add_argument("--models", default="random,smollm2", help="of the two; --quick takes the first alone")
        parser.add_argument("--ours", default="{}", metavar="JSON", help="fields of `serve` for our endpoint")
        parser.add_argument("--torch", action="store_true", help="ours decodes with torch in float32 too")
        parser.add_argument("--serve", help="DIRECTORY:WORK:PORT, for the process that serves ours")

    options = arguments(__doc__ or "", own)
    if options.serve:
        directory, work, port = options.serve.split(":")
        serve(Path(directory), Path(work), int(port), json.loads(options.ours))
        return
    names = [OURS, PLAIN, BATCHING, *([LLAMA] if options.llama_cpp else [])]
    known = {"random": ("Llama 8 x 512", save_random), "smollm2": ("SmolLM2-135M", save_smollm2)}
    models = [known[name] for name in options.models.split(",")[: 1 if options.quick else None]]
    new_tokens = 32 if options.quick else NEW_TOKENS
    rows, result = [], {}
    for title, save in models:
        for dtype in (torch.float32,) if options.quick else (torch.float32, torch.bfloat16):
            with tempfile.TemporaryDirectory(prefix="raystill-bench-") as place:
                directories = dict.fromkeys(names, save(Path(place) / "model", dtype))
                if dtype == torch.float32 and not options.torch:
                    directories[OURS] = graph_of(directories[OURS], Path(place) / "graph")
                servers = compare(directories, options.repeats or 5, new_tokens, options.llama_cpp, options.ours)
            label = f"{title}, {str(dtype).removeprefix('torch.')}"
            for server in servers:
                firsts = [f"{statistics.median(server.first_s[count]) * 1000:,.0f}" for count in STREAMS]
                figures = [f"{server.ms_per_token():.1f}", firsts[0], f"{server.tokens_per_s():,.0f}", firsts[1]]
                rows.append([f"{label}: {server.name}", *figures])
            result[label] = _ratios({server.name: server for server in servers})
    first = next(iter(result.values()))
    columns = ["server", "1 stream: ms/token", "first ms", "16 streams: tokens/s", "first ms"]
    show(f"Streams of up to {new_tokens} tokens over HTTP (medians)", columns, rows, {**first, "by_model": result})


def _ratios(servers: dict[str, Server]) -> dict[str, float]:
    """Ours beside transformers at its better setting for each figure, and beside llama.cpp."""
    ours, peers = servers[OURS], [servers[PLAIN], servers[BATCHING]]
    found = {
        "throughput_ratio_16": ours.tokens_per_s() / max(peer.tokens_per_s() for peer in peers),
        "latency_ratio_1": ours.ms_per_token() / min(peer.ms_per_token() for peer in peers),
    }
    if LLAMA in servers:
        found["throughput_ratio_16_llama_cpp"] = ours.tokens_per_s() / servers[LLAMA].tokens_per_s()
        found["latency_ratio_1_llama_cpp"] = ours.ms_per_token() / servers[LLAMA].ms_per_token()
    return found


if __name__ == "__main__":
    main()
