"""Configuration and wire records of the OpenAI-style endpoint. Imports neither torch nor ray.

Requests are strict (`true` is not a number) and name what is supported. Parameters that would change the answer and are
not supported are refused unless they have their neutral value; keys nobody knows are ignored and logged.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from cluster.config import Config, execution
from services.endpoint.errors import invalid

MAX_TOP_LOGPROBS = 20
Role = Literal["system", "developer", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length"]


class EndpointConfig(Config):
    host: str = execution("127.0.0.1")
    port: int = execution(8000, ge=1, le=65535)
    replicas: int = execution(1, ge=1)
    """Of each version that serves; each holds the model."""
    keep_previous: bool = execution(False)
    """Leave the version that served before in memory, so that a rollback is served at once."""
    routers: int = execution(1, ge=1)
    """Processes that take requests and pass them to the versions."""
    threads_per_replica: int | None = execution(None, ge=1)
    """Default: torch computes with the replica's share of all cores but one, a language model's ONNX graph of all."""
    poll_s: float = execution(2.0, gt=0)
    """How often the endpoint looks whether there is a new champion, and its routers tell what they saw."""
    max_context_tokens: int = Field(2048, ge=8)
    """Prompt and answer together; the model's own limit counts too."""
    max_new_tokens: int = Field(256, ge=1)
    """Default and upper bound of an answer's length."""
    max_choices: int = Field(64, ge=1)
    """Upper bound of prompts times `n` in one request."""
    max_inputs: int = Field(2048, ge=1)
    """Upper bound of texts in one request to an encoder."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of a torch version's weights and arithmetic; `auto` is that of its files where the processor multiplies it."""
    vllm_python: str | None = execution(None, min_length=1)
    """The Python of an environment with vLLM, which then decodes language models in safetensors (float versions, plain
    directories, `compressed_tensors_w4a16`); ONNX graphs and torchao's int8 keep their engines."""
    gpus_per_replica: float = execution(0, ge=0)
    """GPUs for vLLM: a share of one, or several with a part of each layer; 0 for a CPU."""
    max_running: int = execution(16, ge=1)
    """Choices that a replica decodes at the same time."""
    max_waiting: int = execution(32, ge=0)
    """Requests that a replica admits beyond `max_running`; one more is answered 503 with Retry-After."""
    max_cached_tokens: int = execution(16_384, ge=8)
    """Tokens whose keys and values a replica keeps; a choice waits until its prompt and longest answer fit."""
    max_admitted_tokens: int = execution(65_536, ge=8)
    """Prompts and longest answers of all requests that run or wait; above it the next one is answered 503."""
    max_body_bytes: int = execution(1 << 20, ge=1024)
    """Larger request bodies are answered 413."""
    teacher_url: str | None = execution(None)
    """Base URL of an OpenAI-style endpoint with the teacher, such as `raystill serve --model DIR` prints: the page asks
    it beside the versions. A key for it is in RAYSTILL_TEACHER_KEY, never here."""
    teacher_name: str | None = execution(None, min_length=1)
    """What the teacher is called there; default: the one model that it lists."""

    @field_validator("teacher_url")
    @classmethod
    def _is_a_base_url(cls, url: str | None) -> str | None:
        if url is None:
            return None
        try:
            parts = urlsplit(url)
            found = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            found = False
        if not found:
            raise ValueError("expected a base URL such as http://127.0.0.1:8001")
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError("a base URL has no user, password, query or fragment; a key goes in RAYSTILL_TEACHER_KEY")
        return url.rstrip("/").removesuffix("/v1")

    @field_validator("vllm_python")
    @classmethod
    def _lies_where_it_was_named(cls, python: str | None) -> str | None:
        """A replica has another working directory. What a link points to would be another environment."""
        return python if python is None or "/" not in python else str(Path(python).expanduser().absolute())

    @model_validator(mode="after")
    def _gpus_are_whole_and_for_vllm(self) -> Self:
        if self.gpus_per_replica > 1 and self.gpus_per_replica % 1:
            raise ValueError(f"gpus_per_replica={self.gpus_per_replica:g}: below 1, or a whole number")
        if self.gpus_per_replica and self.vllm_python is None:
            raise ValueError(
                f"gpus_per_replica={self.gpus_per_replica:g} are for vLLM, and vllm_python is not set: our own engines "
                "compute on CPUs"
            )
        return self

    @property
    def loading_s(self) -> float:
        """How long a model may take to be loaded: vLLM compiles it too, and reads it from a slow disk if need be."""
        return 180.0 if self.vllm_python is None else 1800.0


class ServedArguments(EndpointConfig):
    """What the HTTP interface needs to know, wherever its model comes from."""

    model_name: str = Field(min_length=1)
    """What clients call the model: the registered one whose champion is served, or the name given to a directory."""
    database: str = ""
    """SQLAlchemy URL of the database with the API keys; empty: no keys are known, and none is asked for."""


class EndpointArguments(ServedArguments):
    """What the application is built from: `serve run services.endpoint.deployment:app model_name=... database=...`."""

    database: str = Field(min_length=1)
    """SQLAlchemy URL of the database that holds the champion's row."""
    resources: dict[str, float] = execution({})
    """Custom resources that each replica takes, such as `{endpoint_slot: 1}`."""
    label_selector: dict[str, str] = execution({})
    """Labels that a replica's node must have."""
    tracking: str = ""
    """MLflow's URI, where the end of a canary is written down; empty: only in the database."""


class CanaryConfig(Config):
    """How a challenger becomes champion: shares of the traffic, and the limits that take it down on the way.

    A step is passed when it has lasted `hold_s`, the challenger has answered `min_requests`, and every limit is kept.
    With less evidence nothing is decided: the challenger stays at its step.
    """

    steps: list[Annotated[float, Field(ge=0, lt=1)]] = Field([0.05, 0.25, 0.5], min_length=1)
    """Shares of the users that the challenger answers, one step after the other; 0 with `shadow` only compares."""
    hold_s: float = Field(60.0, ge=0)
    """Least time at each step."""
    min_requests: int = Field(50, ge=1)
    """Least number of the challenger's answers at each step (at a step of 0, of comparisons)."""
    max_error_rate: float = Field(0.01, ge=0, lt=1)
    """Largest share of answers that failed: status 5xx, a stream that broke, a replica that died."""
    max_latency_ratio: float | None = Field(1.5, gt=0)
    """Largest median of the time to the first token, and of the time per token, as a multiple of the champion's."""
    max_disagreement: float | None = Field(None, gt=0)
    """Largest mean difference, in nats per token, between the log-probabilities that champion and challenger give to
    the champion's greedy answer; needs `shadow`."""
    shadow: float = Field(0.0, ge=0, le=1)
    """Share of the champion's requests that are asked again, of both versions, only to compare them."""

    @model_validator(mode="after")
    def _steps_rise_and_compare(self) -> Self:
        if any(later <= earlier for earlier, later in zip(self.steps, self.steps[1:], strict=False)):
            raise ValueError(f"steps={self.steps} must rise: give each share once, the smallest first")
        if self.steps[0] == 0 and not self.shadow:
            raise ValueError("steps begins with 0, where only shadow traffic shows anything, and shadow=0: set shadow")
        if self.max_disagreement is not None and not self.shadow:
            raise ValueError(
                f"max_disagreement={self.max_disagreement} compares answers to shadow traffic, and shadow=0: set shadow"
            )
        return self


class DirectoryArguments(ServedArguments):
    """What the application around one plain directory is built from."""

    directory: str = Field(min_length=1)
    """A model directory that every replica reaches, in any form that `cluster.pretrained.locate` takes."""

    @model_validator(mode="after")
    def _has_no_teacher(self) -> Self:
        if self.teacher_url is not None:
            raise ValueError("teacher_url is asked beside a champion, and a plain directory has none: drop it")
        return self


# --- requests ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """How to answer one prompt."""

    max_new_tokens: int | None = None
    """None: as many as the endpoint's config and the context allow."""
    temperature: float = 1.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    num_choices: int = 1
    top_logprobs: int | None = None
    """None: no log-probabilities; k: those of the chosen token and of the k most likely ones."""
    echo: bool = False
    """Repeat the prompt in front of the answer, with its log-probabilities if those are asked for."""


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool = False


StopText = Annotated[str, StringConstraints(min_length=1, max_length=256)]
TemplateText = Annotated[str, StringConstraints(max_length=4096)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class RequestBody(BaseModel):
    """What every request has: the model's name, and keys that nobody knows, which are ignored."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    model: str

    def unknown_keys(self) -> list[str]:
        """Keys of the body that are ignored, apart from those that OpenAI's clients send and that change nothing."""
        return sorted((self.model_extra or {}).keys() - UNSUPPORTED.keys() - _TOLERATED)

    def check_size(self, config: EndpointConfig) -> None:
        """Raises `ApiError` if the request asks for more than the endpoint gives to one."""

    def longest_answer(self, max_new_tokens: int) -> int:
        """Tokens that may be written for the request, all choices together."""
        return 0


class _SamplingRequest(RequestBody):
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Seed | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _check_common(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options is only allowed when stream is true", "stream_options")
        for name, neutral in UNSUPPORTED.items():
            value = (self.model_extra or {}).get(name)
            if value is not None and (isinstance(value, bool) or value not in neutral):
                raise invalid(f"{name} is not supported by this endpoint; leave it out", name, "unsupported_parameter")
        return self

    def num_prompts(self) -> int:
        return 1

    def check_size(self, config: EndpointConfig) -> None:
        num_prompts, most = self.num_prompts(), config.max_choices
        if num_prompts * (self.n or 1) > most:
            param = "n" if num_prompts <= most else "prompt"
            raise invalid(f"At most {most} choices (prompts times n) in one request", param)

    def longest_answer(self, max_new_tokens: int) -> int:
        sampling = self.sampling()
        longest = max_new_tokens if sampling.max_new_tokens is None else sampling.max_new_tokens
        return min(longest, max_new_tokens) * sampling.num_choices * self.num_prompts()

    def sampling(self) -> Sampling:
        """How to answer each prompt."""
        raise NotImplementedError

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def _sampling(self, **fields: Any) -> Sampling:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=stop,
            num_choices=self.n or 1,
            **fields,
        )


UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "web_search_options": (),
}
"""Parameters of OpenAI's interface that are refused, with the values that ask for nothing."""

_TOLERATED = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "parallel_tool_calls",
    "safety_identifier",
    "prompt_cache_key",
}

# A list ends at its first mistake: one message is wanted, and a body may hold half a million of them.
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, fail_fast=True)]
Texts = Annotated[list[str], Field(min_length=1, fail_fast=True)]
ManyTokenIds = Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
TextOrTokens = str | TokenIds | Texts | ManyTokenIds
"""One text, one text's token ids, several texts, or the token ids of several."""


def one_by_one(given: TextOrTokens) -> list[str | list[int]]:
    """The texts of a request, each as text or token ids."""
    if isinstance(given, str):
        return [given]
    if isinstance(given[0], int):
        return [given]
    return list(given)


class CompletionRequest(_SamplingRequest):
    prompt: TextOrTokens
    max_tokens: Annotated[int, Field(ge=0, le=2**31)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = None

    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one, each a text or token ids."""
        return one_by_one(self.prompt)

    def num_prompts(self) -> int:
        return len(self.prompts())

    def sampling(self) -> Sampling:
        return self._sampling(max_new_tokens=self.max_tokens, top_logprobs=self.logprobs, echo=bool(self.echo))


class TextPart(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    model_config = ConfigDict(strict=True)

    role: Role
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    @field_validator("content")
    @classmethod
    def _not_null(cls, content: Any, info: Any) -> Any:
        if content is None and info.data.get("role") != "assistant":
            raise ValueError("null is only allowed for role assistant")
        return content

    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class ChatRequest(_SamplingRequest):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1024, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    chat_template_kwargs: (
        Annotated[dict[str, bool | int | float | TemplateText | None], Field(max_length=64, fail_fast=True)] | None
    ) = None
    enable_thinking: bool | None = None
    """The same as `chat_template_kwargs: {"enable_thinking": ...}`; false also means that no reasoning is returned."""
    return_reasoning: bool | None = None
    """Whether the answer has `reasoning_content`; by default it has, if the model's template has a thinking block."""

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs is only allowed when logprobs is true", "top_logprobs")
        return self

    def template_arguments(self) -> dict[str, Any]:
        """Variables for the chat template, over and above the messages."""
        arguments: dict[str, Any] = dict(self.chat_template_kwargs or {})
        if self.enable_thinking is not None:
            arguments["enable_thinking"] = self.enable_thinking
        return arguments

    def wants_reasoning(self) -> bool:
        """Whether reasoning, if there is any, is part of the answer."""
        return self.return_reasoning is not False and self.template_arguments().get("enable_thinking") is not False

    def sampling(self) -> Sampling:
        return self._sampling(
            max_new_tokens=self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens,
            top_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )
