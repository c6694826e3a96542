"""A registered version in memory: loads a verified directory and answers prompts. Knows torch, not Ray.

Every choice is decoded on its own, one row at a time: an answer then depends on the request alone and not on what else
is being served, so that equal seeds give equal texts under any load. The prompt is read once and its cache copied for
each choice. A torch model keeps a cache of keys and values; an ONNX graph has none and reads the whole sequence anew
for every token, which suits short answers only.

Axes: T positions, V vocabulary.
"""

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cluster.errors import ModelError
from cluster.published import MANIFEST
from services.endpoint.decoding import TextStream, TokenLogprob, Vocabulary, choose_token, token_logprobs
from services.endpoint.errors import invalid
from services.endpoint.schema import ChatMessage, FinishReason, Sampling

DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""Used for tokenizers without a template: one line `role: text` per message, then `assistant:`."""

_PREFILL_TOKENS = 256
"""Tokens of a prompt read in one forward pass; bounds the [T, V] logits of an echoed prompt and the wait for cancel."""


@dataclass(frozen=True)
class Piece:
    """A part of the answer: what one or more tokens added to one choice."""

    index: int
    text: str = ""
    tokens: list[TokenLogprob] = field(default_factory=list)
    num_sampled: int = 0
    """Tokens sampled since the choice's last piece."""
    finish_reason: FinishReason | None = None
    """Set in the choice's last piece."""


class _Sequence(Protocol):
    """A sequence that a model has read so far."""

    def extend(self, token_ids: list[int], last_only: bool) -> Tensor:
        """Reads more tokens; returns their logits [T, V], or those of the last one [1, V]."""

    def copy(self) -> "_Sequence": ...


class ServedModel:
    """A version that answers. Safe to use from several threads; holds no state between requests."""

    def __init__(self, directory: Path, max_context_tokens: int, max_new_tokens: int) -> None:
        """Loads a directory whose files were verified, and reads one token to see that it works.

        Raises:
            ModelError: the directory cannot be served; the message says why.
        """
        from transformers import AutoTokenizer

        self.scheme = _read_json(directory / MANIFEST).get("scheme", "float")
        config = _read_json(directory / "config.json")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(str(directory))
        except (OSError, ValueError) as error:
            raise ModelError(f"{directory.name}: no tokenizer could be loaded ({error})") from error
        # A limit saved with the tokenizer would cut long prompts without a word.
        self.tokenizer.backend_tokenizer.no_truncation()
        self.tokenizer.backend_tokenizer.no_padding()
        self.vocabulary = Vocabulary(self.tokenizer)
        self._new_sequence = _load_weights(directory, self.scheme)
        limits = [config.get(name) for name in ("max_position_embeddings", "n_positions", "max_sequence_length")]
        self.max_context_tokens = min([max_context_tokens, *(limit for limit in limits if isinstance(limit, int))])
        self.max_new_tokens = max_new_tokens
        self._eos_ids = _eos_ids(directory, config, self.tokenizer)
        logits_TV = self._new_sequence().extend([0], last_only=True)
        if logits_TV.shape[-1] < self.vocabulary.size:
            raise ModelError(
                f"the model has {logits_TV.shape[-1]} outputs, its tokenizer {self.vocabulary.size} tokens: "
                "register the student with the tokenizer that it was trained with"
            )
        self._check_finite(logits_TV)

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

    def generate(
        self, prompt_ids: list[int], sampling: Sampling, cancelled: Callable[[], bool], first_index: int = 0
    ) -> Iterator[Piece]:
        """Answers a prompt that passed `check_length`: the choices one after the other, each piece by piece.

        Args:
            cancelled: asked before every forward pass; once true, the answer just ends.
            first_index: index of the first choice.

        Raises:
            ModelError: the model gave a logit that is not a number.
        """
        sequence = self._new_sequence()
        prompt_logprobs: list[TokenLogprob] = []
        scored = sampling.echo and sampling.top_logprobs is not None
        if scored:
            prompt_logprobs.append(TokenLogprob(prompt_ids[0], None, ()))
        for start in range(0, len(prompt_ids), _PREFILL_TOKENS):
            if cancelled():
                return
            logits_TV = sequence.extend(prompt_ids[start : start + _PREFILL_TOKENS], last_only=not scored)
            self._check_finite(logits_TV)
            if scored:
                following = prompt_ids[start + 1 : start + 1 + len(logits_TV)]
                scores_TV = logits_TV[: len(following), : self.vocabulary.size]
                prompt_logprobs += token_logprobs(scores_TV, following, sampling.top_logprobs or 0)
        for choice in range(sampling.num_choices):
            own = sequence if choice == sampling.num_choices - 1 else sequence.copy()
            index = first_index + choice
            echoed = 0
            if sampling.echo:
                piece = self._echo(index, prompt_ids, prompt_logprobs)
                echoed = len(piece.text)
                yield piece
            text = TextStream(self.vocabulary, sampling.stop, prompt_ids, offset=echoed)
            yield from self._decode(index, own, logits_TV[-1], len(prompt_ids), text, sampling, cancelled)

    def _decode(
        self,
        index: int,
        sequence: _Sequence,
        logits_V: Tensor,
        num_prompt: int,
        text: TextStream,
        sampling: Sampling,
        cancelled: Callable[[], bool],
    ) -> Iterator[Piece]:
        generator = torch.Generator()
        if sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed((sampling.seed + index) % 2**63)
        limit = self.max_new_tokens if sampling.max_new_tokens is None else sampling.max_new_tokens
        limit = min(limit, self.max_context_tokens - num_prompt)
        finish: FinishReason = "length"
        num_sampled = 0
        for step in range(limit):
            if cancelled():
                return
            # Rows behind the tokenizer's are padding: never sampled, and without a share of the probability.
            logits_V = logits_V[: self.vocabulary.size]
            token_id = choose_token(logits_V, sampling.temperature, sampling.top_p, generator)
            num_sampled += 1
            if token_id in self._eos_ids:
                finish = "stop"
                break
            logprob = None
            if sampling.top_logprobs is not None:
                logprob = token_logprobs(logits_V[None], [token_id], sampling.top_logprobs)[0]
            delta, tokens = text.push(token_id, logprob)
            if delta or tokens:
                yield Piece(index, delta, tokens, num_sampled)
                num_sampled = 0
            if text.stopped:
                finish = "stop"
                break
            if step + 1 < limit:
                logits_V = sequence.extend([token_id], last_only=True)[-1]
                self._check_finite(logits_V)
        delta, tokens = text.finish()
        # Text that was held back can turn out to hold a stop text only when a character was left unfinished.
        yield Piece(index, delta, tokens, num_sampled, "stop" if text.stopped else finish)

    def _echo(self, index: int, prompt_ids: list[int], logprobs: list[TokenLogprob]) -> Piece:
        """The prompt as the model read it: the text of its tokens, without special ones."""
        stream = TextStream(self.vocabulary, (), [])
        parts = [stream.push(token_id, logprobs[t] if logprobs else None) for t, token_id in enumerate(prompt_ids)]
        parts.append(stream.finish())
        return Piece(index, "".join(text for text, _ in parts), [token for _, tokens in parts for token in tokens])

    def _check_finite(self, logits: Tensor) -> None:
        if not torch.isfinite(logits[..., : self.vocabulary.size]).all():
            raise ModelError("the model gave a logit that is not a finite number; retrain or register another version")


_TEMPLATE_PARAMETERS = frozenset(
    {
        "self", "conversation", "conversations", "messages", "tools", "documents", "chat_template",
        "add_generation_prompt",
        "continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length",
        "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
    }
)  # fmt: skip
"""What a client must not pass to the template, because the call itself sets it."""


# --- weights ----------------------------------------------------------------------------------------------------------


def _load_weights(directory: Path, scheme: str) -> Callable[[], _Sequence]:
    """A maker of empty sequences of the model in a directory."""
    if scheme == "onnx_int8":
        return _load_onnx(directory)
    if scheme not in ("float", "int8_weight_only"):
        raise ModelError(f"scheme {scheme!r} is not known here; known: float, int8_weight_only, onnx_int8")
    if scheme == "int8_weight_only":
        import torchao  # noqa: F401  # registers the tensor types that the file names

    from transformers import DynamicCache

    from cluster.language_model import load_causal_lm

    model = load_causal_lm(str(directory))
    return lambda: _TorchSequence(model, DynamicCache(config=model.config))


class _TorchSequence:
    def __init__(self, model: Any, cache: Any) -> None:
        self._model, self._cache = model, cache

    @torch.inference_mode()
    def extend(self, token_ids: list[int], last_only: bool) -> Tensor:
        output = self._model(
            input_ids=torch.tensor([token_ids]),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1 if last_only else 0,
        )
        return output.logits[0].float()

    def copy(self) -> "_TorchSequence":
        return _TorchSequence(self._model, copy.deepcopy(self._cache))


def _load_onnx(directory: Path) -> Callable[[], _Sequence]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(
            str(directory / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime's own exceptions share no base class
        raise ModelError(f"model.onnx cannot be loaded ({str(error).splitlines()[0]})") from error
    return lambda: _OnnxSequence(session, [])


class _OnnxSequence:
    def __init__(self, session: Any, token_ids: list[int]) -> None:
        self._session, self._token_ids = session, token_ids

    def extend(self, token_ids: list[int], last_only: bool) -> Tensor:
        self._token_ids += token_ids
        feed = {
            "input_ids": np.asarray([self._token_ids], np.int64),
            "position_ids": np.arange(len(self._token_ids), dtype=np.int64)[None],
        }
        logits_TV = torch.from_numpy(self._session.run(["logits"], feed)[0][0]).float()
        return logits_TV[-1:] if last_only else logits_TV[-len(token_ids) :]

    def copy(self) -> "_OnnxSequence":
        return _OnnxSequence(self._session, list(self._token_ids))


def _eos_ids(directory: Path, config: dict[str, Any], tokenizer: Any) -> frozenset[int]:
    """All ids that end a text: the tokenizer's, the model config's and the generation config's."""
    found: set[int] = set()
    generation = _read_json(directory / "generation_config.json")
    for value in (tokenizer.eos_token_id, config.get("eos_token_id"), generation.get("eos_token_id")):
        found.update(value if isinstance(value, list) else [value] if value is not None else [])
    return frozenset(token_id for token_id in found if 0 <= token_id < len(tokenizer))


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
