"""Errors of the endpoint: what a client of the HTTP interface sees, and what a caller of `client.py` catches."""

from typing import Any

from cluster.errors import RaystillError


class EndpointUnavailable(RaystillError, ConnectionError):
    """The endpoint did not answer, was not healthy within the deadline, or answered with an error."""


class ApiError(Exception):
    """A request that is answered with an error: HTTP status and OpenAI's envelope.

    Not a `ValueError`, so that it passes unchanged through pydantic's validators.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = headers or {}

    def envelope(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the client has to change the request."""
    return ApiError(400, message, param=param, code=code)


def not_supported(path: str, model: str, does: str) -> ApiError:
    """404: the model is there, but does something else."""
    message = f"{path} is not for this model: {model!r} {does}"
    return ApiError(404, message, param="model", code="operation_not_supported")


def unavailable(message: str, code: str, retry_after_s: int) -> ApiError:
    """503: the same request may succeed later."""
    return ApiError(503, message, kind="server_error", code=code, headers={"retry-after": str(retry_after_s)})


def internal() -> ApiError:
    """500: the cause is in the log, not in the answer."""
    return ApiError(500, "The server had an error; see its log under this request id.", kind="server_error")
