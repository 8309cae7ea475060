"""Errors of the server, in OpenAI's shape. They contain nothing of the server's inside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse

# Status → OpenAI's type of the error. The client libraries choose their exception by the status.
TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
    404: "not_found_error", 405: "invalid_request_error", 408: "timeout_error",
    413: "invalid_request_error", 415: "invalid_request_error", 429: "rate_limit_error",
    500: "server_error", 503: "server_error",
}  # fmt: skip
RETRY_SECONDS = 1
INTERNAL = "internal error: the server's log has the reason"


class ApiError(Exception):
    """An answer with this HTTP status and message. param  field of the request; code  OpenAI's"""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def content(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "server_error")
        fields = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": fields}

    def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        """Returns the response. 429 and 503 ask the client to wait."""
        waits = {"Retry-After": str(RETRY_SECONDS)} if self.status in (429, 503) else {}
        return JSONResponse(self.content, self.status, {**waits, **(headers or {})})


class BadRequest(ApiError):
    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(400, message, param, code)


class Full(ApiError):
    """The queue is at its limit."""

    def __init__(self, limit: int) -> None:
        message = f"the server has its limit of {limit} texts, waiting texts included: try later"
        super().__init__(429, message, code="queue_full")
