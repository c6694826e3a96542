"""Wire records of the two paths for encoders: embeddings and classifications. Imports neither torch nor ray."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from services.endpoint.errors import invalid
from services.endpoint.schema import EndpointConfig, RequestBody, TextOrTokens, one_by_one


class _InputRequest(RequestBody):
    input: TextOrTokens
    truncate: bool | None = None
    """Whether a text longer than the model reads is cut at its end; by default it is refused."""

    def inputs(self) -> list[str | list[int]]:
        """The texts one by one, each as text or token ids."""
        return one_by_one(self.input)

    def check_size(self, config: EndpointConfig) -> None:
        if (found := len(self.inputs())) > config.max_inputs:
            raise invalid(f"At most {config.max_inputs} inputs in one request, found {found}", "input")


class EmbeddingRequest(_InputRequest):
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=2**20)] | None = None


class ClassificationRequest(_InputRequest):
    top_k: Annotated[int, Field(ge=1, le=2**20)] | None = None
    """How many labels are returned, the most likely first; by default all."""


class InputUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str
    """Numbers, or base64 of float32 in little-endian order."""


class EmbeddingList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: InputUsage


class LabelProbability(BaseModel):
    label: str
    probability: float


class Classification(BaseModel):
    object: Literal["classification"] = "classification"
    index: int
    label: str
    """The most likely label."""
    probabilities: list[LabelProbability]
    """Descending; they add up to 1 unless the model gives each label a probability of its own."""


class ClassificationList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Classification]
    model: str
    usage: InputUsage
