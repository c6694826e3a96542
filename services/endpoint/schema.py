"""Configuration and wire records of the OpenAI-style endpoint. Imports neither torch nor ray."""

from pydantic import Field

from cluster.config import Config, execution


class EndpointConfig(Config):
    host: str = execution("127.0.0.1")
    port: int = execution(8000, ge=1, le=65535)
    replicas: int = execution(1, ge=1)
    threads_per_replica: int | None = execution(None, ge=1)
    poll_s: float = execution(2.0, gt=0)
    """How often a replica looks whether there is a new champion."""
    max_context_tokens: int = Field(2048, ge=8)
    """Prompt and answer together; the model's own limit counts too."""
    max_new_tokens: int = Field(256, ge=1)
    """Default and upper bound of an answer's length."""
