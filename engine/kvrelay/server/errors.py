"""What goes wrong, as HTTP: one status and OpenAI's error object for everything, and no other shape."""

import re
from collections.abc import Mapping
from http import HTTPStatus

import msgspec
from fastapi import Response

from kvrelay import errors
from kvrelay.server.responses import ErrorBody, ErrorResponse

_FIELD = re.compile(r"([a-z_]\w*(?:[.\[][\w.\[\]]*)?)[=:]")
_KINDS: dict[type[errors.KVRelayError], tuple[int, str, str | None]] = {  # the first that matches
    errors.ContextLengthExceeded: (400, "invalid_request_error", "context_length_exceeded"),
    errors.InvalidRequest: (400, "invalid_request_error", None),
    errors.Overloaded: (429, "rate_limit_error", "overloaded"),
    errors.DeadlineExceeded: (503, "server_error", "deadline_exceeded"),
    errors.NoWorker: (503, "server_error", "no_worker"),
    errors.EngineClosed: (503, "server_error", "shutting_down"),
    errors.KVRelayError: (500, "server_error", None),
}
MAX_MESSAGE = 1000  # characters: what a client sent must not come back by the megabyte
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}


class Refused(Exception):
    """A request that never reaches the engine; `headers` go with the response."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, dict(headers or {})


def error_body(error: Exception) -> tuple[int, ErrorResponse]:
    """Status and document of any exception; what is not ours says only that it happened."""
    message, param = str(error), None
    if isinstance(error, Refused):
        status, code = error.status, error.code
        kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    elif isinstance(error, errors.KVRelayError):
        status, kind, code = next(row for base, row in _KINDS.items() if isinstance(error, base))
        found = _FIELD.match(message) if status == HTTPStatus.BAD_REQUEST else None
        param = found.group(1) if found else None
    else:
        status, kind, code = 500, "server_error", None
        message = f"internal error ({type(error).__name__}); the server's log has the details"
    if len(message) > MAX_MESSAGE:
        message = f"{message[:MAX_MESSAGE]} … ({len(message)} characters)"
    return status, ErrorResponse(error=ErrorBody(message=message, type=kind, param=param, code=code))


def error_response(error: Exception) -> Response:
    """The response that tells a client of `error`."""
    status, document = error_body(error)
    headers = dict(error.headers) if isinstance(error, Refused) else {}
    if isinstance(error, errors.Overloaded):
        headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
    content = msgspec.json.encode(document)
    return Response(content, status, headers=headers, media_type="application/json")
