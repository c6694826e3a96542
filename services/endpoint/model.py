"""A registered version in memory: loads a verified directory and answers prompts. Knows torch, not Ray.

The tokenizer works on the caller's side, the model behind a scheduler that shares it between all requests. What a
version is made of decides its engine: `services.endpoint.engines`.
"""

import json
from pathlib import Path
from typing import Any, Literal

from cluster.errors import ModelError
from cluster.pretrained import uncut_tokenizer
from cluster.published import MANIFEST
from services.endpoint.decoding import Piece, Vocabulary
from services.endpoint.engines.base import Engine, Read
from services.endpoint.engines.loading import load_engine
from services.endpoint.engines.requests import NOT_FINITE, Capacity, Load, Runner, too_few_outputs
from services.endpoint.engines.scheduler import Scheduler
from services.endpoint.engines.vllm import VllmRunner, VllmSettings, decodes
from services.endpoint.errors import invalid
from services.endpoint.running import Running
from services.endpoint.schema import ChatMessage, Sampling

__all__ = ["DEFAULT_CHAT_TEMPLATE", "Capacity", "Piece", "ServedModel"]

DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""Used for tokenizers without a template: one line `role: text` per message, then `assistant:`."""


class ServedModel:
    """A version that answers. Safe to use from several threads; what is not referred to any more frees its memory."""

    def __init__(
        self,
        directory: Path,
        max_context_tokens: int,
        max_new_tokens: int,
        capacity: Capacity | None = None,
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        graph_threads: int | None = None,
        vllm: VllmSettings | None = None,
    ) -> None:
        """Loads a directory whose files were verified, and reads one token to see that it works.

        Args:
            dtype: of the weights and the arithmetic of a torch model; `auto` is that of the files where the processor
                multiplies it, and float32 elsewhere. ONNX graphs have their own.
            graph_threads: of an ONNX graph; by default torch's number.
            vllm: decodes what it can; the rest keeps our engines.

        Raises:
            ModelError: the directory cannot be served; the message says why.
        """
        self.scheme = _read_json(directory / MANIFEST).get("scheme", "float")
        config = _read_json(directory / "config.json")
        self.tokenizer = uncut_tokenizer(directory)
        self.vocabulary = Vocabulary(self.tokenizer)
        limits = [config.get(name) for name in ("max_position_embeddings", "n_positions", "max_sequence_length")]
        self.max_context_tokens = min([max_context_tokens, *(limit for limit in limits if isinstance(limit, int))])
        self.max_new_tokens = max_new_tokens
        capacity = capacity or Capacity()
        eos_ids = _eos_ids(directory, config, self.tokenizer)
        self._scheduler: Runner
        if vllm is not None and decodes(directory, self.scheme):
            of_text = (self.vocabulary, eos_ids)
            self._scheduler = VllmRunner(directory, vllm, *of_text, capacity, self.max_context_tokens, dtype)
            return
        # A choice that fills the context must find room at least when it is alone.
        max_cached_tokens = max(capacity.max_cached_tokens, self.max_context_tokens)
        engine = load_engine(directory, self.scheme, dtype, max_cached_tokens, graph_threads)
        _check_outputs(engine, self.vocabulary.size)
        self._scheduler = Scheduler(engine, self.vocabulary, eos_ids, capacity)

    # --- prompts ---

    def encode(self, prompt: str | list[int]) -> list[int]:
        """Token ids of a text (with the tokenizer's special tokens, such as a begin-of-text), or checked ids.

        Raises:
            ApiError: an id that is not in the vocabulary.
        """
        if isinstance(prompt, list):
            wrong = next((token_id for token_id in prompt if token_id >= self.vocabulary.size), None)
            if wrong is not None:
                raise invalid(f"token id {wrong} is not below {self.vocabulary.size}", "prompt", "invalid_value")
            return prompt
        token_ids = self.tokenizer.encode(prompt)
        if not token_ids:
            start = self.tokenizer.bos_token_id
            start = self.tokenizer.eos_token_id if start is None else start
            if start is None:
                raise invalid("The prompt has no tokens", "prompt", "invalid_value")
            token_ids = [start]
        return token_ids

    def encode_chat(self, messages: list[ChatMessage], arguments: dict[str, Any]) -> list[int]:
        """Token ids of a conversation in the tokenizer's chat template, or in `DEFAULT_CHAT_TEMPLATE`.

        Control tokens in the messages are read as ordinary text, so that a user cannot write as somebody else.

        Raises:
            ApiError: the template refuses the conversation.
        """
        from jinja2 import TemplateError

        reserved = sorted(arguments.keys() & _TEMPLATE_PARAMETERS)
        if reserved:
            raise invalid(f"chat_template_kwargs must not set {reserved[0]}", "chat_template_kwargs", "invalid_value")
        # Templates know `system`; `developer` is OpenAI's newer name for it.
        conversation = [
            {"role": "system" if message.role == "developer" else message.role, "content": message.text()}
            for message in messages
        ]
        try:
            token_ids = self.tokenizer.apply_chat_template(
                conversation,
                chat_template=self.tokenizer.chat_template or DEFAULT_CHAT_TEMPLATE,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                sanitize_control_tokens=True,
                **arguments,
            )
        except (TemplateError, TypeError) as error:  # a template may add what a client gave as another type
            raise invalid(f"The model's chat template refuses this conversation: {error}", "messages") from None
        return list(token_ids)

    def check_length(self, prompt_ids: list[int], sampling: Sampling, param: str) -> None:
        """Raises `ApiError` if prompt and answer do not fit the context, or the answer is longer than allowed."""
        asked = sampling.max_new_tokens
        if asked is not None and asked > self.max_new_tokens:
            raise invalid(f"At most {self.max_new_tokens} tokens can be generated, asked for {asked}", "max_tokens")
        needed = len(prompt_ids) + (1 if asked is None else asked)
        if needed > self.max_context_tokens:
            raise invalid(
                f"This model's context is {self.max_context_tokens} tokens; the prompt has {len(prompt_ids)} "
                f"and {needed - len(prompt_ids)} are to be generated",
                param,
                "context_length_exceeded",
            )

    # --- answers ---

    @property
    def load(self) -> Load:
        """What is running and waiting now."""
        return self._scheduler.load

    def check(self) -> None:
        """Raises `ModelError` if it will never answer again."""
        self._scheduler.check()

    def check_room(self) -> None:
        """Raises `ApiError` with status 503 if no request is taken now, before its tokens are counted."""
        self._scheduler.check_room(0)

    def submit(self, prompts: list[list[int]], sampling: Sampling) -> Running:
        """Starts to answer prompts that passed `check_length`; called on the event loop.

        Choice `c` of prompt `p` has the index `p * num_choices + c`.

        Raises:
            ApiError: status 503, at once, while too much is admitted.
        """
        limit = self.max_new_tokens if sampling.max_new_tokens is None else sampling.max_new_tokens
        limits = [(ids, min(limit, self.max_context_tokens - len(ids))) for ids in prompts]
        running = Running(sum(map(len, prompts)), lambda: self._scheduler.load.running)
        job = self._scheduler.submit(limits, sampling, running.deliver)
        running.on_cancel(lambda: self._scheduler.cancel(job))
        return running


_TEMPLATE_PARAMETERS = frozenset(
    {
        "self", "conversation", "conversations", "messages", "tools", "documents", "chat_template",
        "add_generation_prompt",
        "continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length",
        "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
    }
)  # fmt: skip
"""What a client must not pass to the template, because the call itself sets it."""


def _check_outputs(engine: Engine, vocabulary_size: int) -> None:
    """Reads one token.

    Raises:
        ModelError: there are fewer outputs than tokens, or one of them is no number.
    """
    import torch

    place = engine.reserve(1)
    assert place is not None
    logits_NV = engine.forward([Read(place, [0])])
    engine.release(place)
    if logits_NV.shape[-1] < vocabulary_size:
        raise too_few_outputs(logits_NV.shape[-1], vocabulary_size)
    if not torch.isfinite(logits_NV[:, :vocabulary_size]).all():
        raise ModelError(NOT_FINITE)


def _eos_ids(directory: Path, config: dict[str, Any], tokenizer: Any) -> frozenset[int]:
    """All ids that end a text: the tokenizer's, the model config's and the generation config's."""
    found: set[int] = set()
    generation = _read_json(directory / "generation_config.json")
    for value in (tokenizer.eos_token_id, config.get("eos_token_id"), generation.get("eos_token_id")):
        found.update(value if isinstance(value, list) else [value] if value is not None else [])
    return frozenset(token_id for token_id in found if 0 <= token_id < len(tokenizer))


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
