"""The endpoint's HTTP interface on a real port of this process, around tiny models, so that real clients connect.

What Ray Serve's proxy adds to every answer (the `x-request-id`) is added here by the same class of Ray's. Where
RAYSTILL_CONFORMANCE_VLLM names the Python of an environment with vLLM, that decodes the language models.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from services.endpoint.api import build_api
from services.endpoint.fixed import FixedModel
from services.endpoint.schema import DirectoryArguments
from tests.local_http import served


@dataclass
class Endpoint:
    """A running endpoint, and what a test may look at behind it."""

    url: str
    name: str
    fixed: FixedModel
    arguments: DirectoryArguments

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def model(self) -> Any:
        assert self.fixed.served is not None
        return self.fixed.served.model

    @property
    def num_admitted(self) -> int:
        """Requests that run or wait."""
        return self.model.load.running + self.model.load.waiting

    def set_full(self, full: bool) -> None:
        """Lets the model take no request at all, or as many as it was made for."""
        most = (0, 0) if full else (self.arguments.max_running, self.arguments.max_waiting)
        scheduler = self.model._scheduler
        scheduler._capacity = replace(scheduler._capacity, max_running=most[0], max_waiting=most[1])

    def wait_idle(self, timeout_s: float = 10) -> None:
        deadline = time.monotonic() + timeout_s
        while self.num_admitted:
            assert time.monotonic() < deadline, "work goes on that nobody waits for"
            time.sleep(0.01)


@contextlib.contextmanager
def endpoint(name: str, directory: Path, **fields: Any) -> Iterator[Endpoint]:
    """Serves a model directory; `fields` are those of `EndpointConfig`."""
    from ray.serve._private.http_util import RequestIdMiddleware

    given = {"vllm_python": os.environ.get("RAYSTILL_CONFORMANCE_VLLM"), **fields}
    arguments = DirectoryArguments(model_name=name, directory=str(directory), **given)
    fixed = FixedModel(arguments)
    with served(RequestIdMiddleware(build_api(arguments, fixed))) as url:
        yield Endpoint(url, name, fixed, arguments)
