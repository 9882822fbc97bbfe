"""What a client is told of a request that is not answered: a status, and a body in the form of OpenAI's API."""

from __future__ import annotations

from typing import Any

from gta_edge.errors import CapacityError, GtaEdgeError, InputError
from gta_edge.serve.scheduler import QueueFullError

__all__ = ["RequestError", "as_request_error", "error_body"]

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class RequestError(GtaEdgeError):
    """A request that is refused.

    Args:
        status: of HTTP.
        problem: what was found, and what was expected.
        remedy: what to do.
        param: the field that it is about; None for the request as a whole.
        code: OpenAI's word for it, which programs read.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        problem: str,
        remedy: str | None = None,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(problem, remedy)
        self.status, self.param, self.code, self.headers = status, param, code, headers or {}


def as_request_error(error: Exception, retry_seconds: int = 1) -> RequestError:
    """Return what a client is told of an error; of an unexpected one only that it happened.

    Args:
        error: raised on the way to an answer.
        retry_seconds: after which a client may ask again where there was no room for its request.
    """
    if isinstance(error, RequestError):
        return error
    if isinstance(error, QueueFullError):
        headers = {"Retry-After": str(retry_seconds)}
        return RequestError(429, error.problem, error.remedy, code="queue_full", headers=headers)
    if isinstance(error, CapacityError):
        return RequestError(400, error.problem, error.remedy, code="context_length_exceeded")
    if isinstance(error, InputError):
        return RequestError(400, error.problem, error.remedy)
    if isinstance(error, GtaEdgeError):
        return RequestError(500, error.problem, error.remedy)
    return RequestError(500, f"the server failed over this request ({type(error).__name__})", "see its log")


def error_body(error: RequestError) -> dict[str, Any]:
    """Return the body that tells an error, as OpenAI's clients read it."""
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}
