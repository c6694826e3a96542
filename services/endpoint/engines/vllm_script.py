"""vLLM around one model, run by the Python of its own environment:

    ENV/bin/python -I services/endpoint/engines/vllm_script.py SETTINGS

Imports nothing of raystill, which that environment does not have. SETTINGS is a JSON object, see `engine_arguments`.
What is asked comes as JSON lines on standard input, what is answered goes as JSON lines to what was standard output;
whatever vLLM prints goes to standard error.

Asked: `{"id", "token_ids", "max_tokens", "temperature", "top_p", "seed", "logprobs", "prompt_logprobs"}` begins an
answer, `{"id", "cancel": true}` ends one. Answered: first `{"ready": {"outputs", "logprob"}}`, the number of the
model's outputs and a log-probability to look at, or `{"failed": reason}`; then for each answer, as it grows, `{"id",
"token_ids", "logprobs", "prompt_logprobs", "finished"}`, or `{"id", "refused": reason}`. A row of log-probabilities is
`[of the token, [[id, value], …]]`, the most likely ones descending; those of a prompt begin with its second token.

No process outlives standard input, or its parent: this one ends when the input does, and vLLM's own (engine core,
workers), which the module `multiprocessing` starts, are killed by the kernel when their parent is gone.
"""

import asyncio
import contextlib
import ctypes
import json
import os
import shutil
import signal
import sys
import threading
from typing import Any

_LOOK_S = 0.5
_PR_SET_PDEATHSIG = 1

if __name__ == "__mp_main__":  # in a child of vLLM's, before anything else is done there
    with contextlib.suppress(AttributeError, OSError):  # only Linux has it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Vocabulary:
    """Added to vLLM's workers. Rows of the embedding behind the tokenizer's last id are padding: never sampled, and
    without a share of the probability."""

    def restrict_vocabulary(self, size):
        """Leaves out all outputs from this one on; returns how many are left."""
        from vllm.model_executor.layers.logits_processor import LogitsProcessor

        model: Any = self.get_model()  # type: ignore[attr-defined]  # the worker's
        found = [module for module in model.modules() if isinstance(module, LogitsProcessor)]
        for module in found:
            module.org_vocab_size = min(module.org_vocab_size, size)
        return min((module.org_vocab_size for module in found), default=0)


def engine_arguments(settings):
    """vLLM's arguments, of `directory`, `dtype`, `max_context_tokens`, `max_running` (choices at the same time),
    `max_cached_tokens`, `gpus` and `seed`."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    gpus = settings["gpus"]
    return AsyncEngineArgs(
        model=settings["directory"],
        # Data alone: no code, no pickle, no tokenizer.
        trust_remote_code=False,
        load_format="safetensors",
        config_format="hf",
        skip_tokenizer_init=True,
        generation_config="vllm",
        dtype=settings["dtype"],
        # vLLM samples a token behind every prompt, also behind one that is only scored.
        max_model_len=settings["max_context_tokens"] + 1,
        max_num_seqs=settings["max_running"],
        tensor_parallel_size=max(1, int(gpus)),
        gpu_memory_utilization=0.9 * min(1.0, gpus) if gpus else 0.9,
        # Compiling took 20 s and more of a CPU, and made no token faster there.
        enforce_eager=current_platform.is_cpu(),
        enable_prefix_caching=True,
        logprobs_mode="raw_logprobs",
        max_logprobs=20,
        seed=settings["seed"],
        worker_extension_cls="__main__.Vocabulary",
        enable_log_requests=False,
        disable_log_stats=True,
    )


def bytes_of_cache(config, num_tokens, num_sequences):
    """Memory on each GPU for keys and values of so many tokens; each sequence leaves a block half empty."""
    model, parallel = config.model_config, config.parallel_config
    block = config.cache_config.block_size or 16
    blocks = -(-num_tokens // block) + num_sequences + 2
    per_layer = (1 if model.use_mla else 2 * model.get_num_kv_heads(parallel)) * model.get_head_size()
    return blocks * block * per_layer * model.get_num_layers(parallel) * model.dtype.itemsize


class Worker:
    """The engine, and the answers that are being written."""

    def __init__(self, settings, asked, answered):
        self._settings, self._asked, self._answered = settings, asked, answered
        self._tasks = {}
        self._lines = []
        self._engine: Any = None

    async def serve(self):
        """Loads the model, says that it is ready or why not, and answers until the engine or the input ends."""
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            await self._load()
        except Exception as error:
            self._say({"failed": f"{type(error).__name__}: {error}"})
            return
        while not self._engine.errored:
            await asyncio.sleep(_LOOK_S)

    async def _load(self):
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.executor import Executor

        settings = self._settings
        config = engine_arguments(settings).create_engine_config()
        cached = max(settings["max_cached_tokens"], settings["max_context_tokens"] + 1)
        config.cache_config.kv_cache_memory_bytes = bytes_of_cache(config, cached, settings["max_running"])
        # On this thread: the kernel watches the thread that starts a child, see above.
        self._engine = AsyncLLM(config, Executor.get_class(config), log_stats=False, log_requests=False)
        outputs = await self._engine.collective_rpc("restrict_vocabulary", args=(settings["vocabulary"],))
        asked = {"id": -1, "token_ids": [0], "max_tokens": 1, "temperature": 0, "top_p": 1, "seed": None}
        async for output in self._outputs({**asked, "logprobs": 0, "prompt_logprobs": None}):
            [[logprob, _]] = rows(output.outputs[0].token_ids, output.outputs[0].logprobs, 0)
        self._say({"ready": {"outputs": min(outputs), "logprob": logprob}})

    # --- what is asked ---

    def _read(self):
        """On a thread of its own, so that the end is seen whatever the engine is at."""
        for line in self._asked:
            self._loop.call_soon_threadsafe(self._take, json.loads(line))
        end()

    def _take(self, message):
        number = message["id"]
        if "cancel" in message:
            if number in self._tasks:
                self._tasks[number].cancel()
            return
        task = self._tasks[number] = self._loop.create_task(self._answer(message))
        task.add_done_callback(lambda _: self._tasks.pop(number))

    # --- what is answered ---

    def _outputs(self, message):
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        names = ("max_tokens", "temperature", "top_p", "seed", "logprobs", "prompt_logprobs")
        params = SamplingParams(
            **{name: message[name] for name in names},
            stop_token_ids=self._settings["eos_ids"],
            ignore_eos=True,  # which is none of its business
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        return self._engine.generate(tokens_input(message["token_ids"]), params, str(message["id"]))

    async def _answer(self, message):
        from vllm.v1.engine.exceptions import EngineDeadError

        number = message["id"]
        try:
            async for output in self._outputs(message):
                choice = output.outputs[0]
                said = {"id": number, "token_ids": list(choice.token_ids), "finished": choice.finish_reason}
                said["logprobs"] = rows(choice.token_ids, choice.logprobs, message["logprobs"])
                if output.prompt_logprobs:  # the first token has none
                    following = message["token_ids"][1:], output.prompt_logprobs[1:]
                    said["prompt_logprobs"] = rows(*following, message["prompt_logprobs"])
                self._say_soon(said)
        except EngineDeadError:
            pass  # seen by `serve`
        except Exception as error:
            self._say_soon({"id": number, "refused": f"{type(error).__name__}: {error}"})

    def _say_soon(self, message):
        """With all others of this turn of the loop: one pass of the model has something for every answer."""
        if not self._lines:
            self._loop.call_soon(self._flush)
        self._lines.append(json.dumps(message) + "\n")

    def _flush(self):
        lines, self._lines = self._lines, []
        self._say_text("".join(lines))

    def _say(self, message):
        self._say_text(json.dumps(message) + "\n")

    def _say_text(self, text):
        try:
            self._answered.write(text)
            self._answered.flush()
        except OSError:  # nobody is there any more
            end()


def rows(token_ids, logprobs, num_top):
    """Of vLLM's log-probabilities, which hold at each position the token's and those of the first ranks."""
    found = []
    for token_id, position in zip(token_ids, logprobs, strict=True):
        top = sorted((item.rank, index, item.logprob) for index, item in position.items() if item.rank <= num_top)
        found.append([position[token_id].logprob, [[index, value] for _, index, value in top]])
    return found


def end(code=0):
    """Ends this process at once; its children follow, and what they shared is cleared away behind them."""
    shutil.rmtree(os.environ["RAYSTILL_SCRATCH"], ignore_errors=True)
    os._exit(code)


def main():
    """Takes standard input and output for itself, and serves."""
    asked, answered = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    asyncio.run(Worker(json.loads(sys.argv[1]), asked, answered).serve())
    end(1)


if __name__ == "__main__":
    main()
