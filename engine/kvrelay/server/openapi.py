"""The OpenAPI document, from the same structs that check requests and write responses.

Source: https://spec.openapis.org/oas/v3.1.0.
"""

from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from kvrelay.server.responses import ErrorResponse

_ERRORS = {
    400: "a field is wrong; `param` names it",
    401: "the API key is missing or wrong",
    403: "without an API key: a host name that is not this machine's",
    404: "no such model or path",
    405: "no such method here",
    408: "the body did not arrive in time",
    413: "the body is too large",
    415: "the body is not JSON by its content type",
    429: "no room now; try again after Retry-After seconds",
    431: "too many headers",
    500: "a worker failed, and so did the attempts elsewhere",
    503: "not ready, no worker alive, shutting down, or past the deadline",
}
_ALWAYS, _WITH_BODY, _ON_ENGINE = (401, 403, 405, 431, 500), (400, 404, 408, 413, 415), (429, 503)
_TEMPLATE = "#/components/schemas/{name}"


class Documents:
    """Collects the structs that routes speak of, and writes their schemas once."""

    def __init__(self) -> None:
        self._structs: list[Any] = [ErrorResponse]

    def route(
        self,
        answer: Any,
        *,
        body: Any = None,
        chunk: Any = None,
        runs_engine: bool = False,
        also: dict[int, Any] | None = None,
    ) -> dict[str, Any]:
        """Keywords of a FastAPI route: its documents, and every error it can end in; `also` adds some."""
        statuses = dict.fromkeys(_ALWAYS, ErrorResponse)
        statuses |= dict.fromkeys(
            (*(_WITH_BODY if body else ()), *(_ON_ENGINE if runs_engine else ())), ErrorResponse
        )
        statuses |= also or {}
        content: dict[str, Any] = {"application/json": {"schema": self._refer(answer)}}
        if chunk is not None:
            self._structs.append(chunk)
            # no type: readers disagree on whether the schema is the stream's or each event's
            content["text/event-stream"] = {"schema": {"description": _stream(chunk)}}
        responses: dict[int | str, Any] = {200: {"description": "done", "content": content}}
        for status, document in sorted(statuses.items()):
            error = {"application/json": {"schema": self._refer(document)}}
            responses[status] = {"description": _ERRORS[status], "content": error}
        keywords: dict[str, Any] = {"responses": responses, "response_model": None}
        if body is not None:
            given = {"required": True, "content": {"application/json": {"schema": self._refer(body)}}}
            keywords["openapi_extra"] = {"requestBody": given}
        return keywords

    def text(self, media_type: str) -> dict[str, Any]:
        """Keywords of a route that answers in text."""
        keywords = self.route(ErrorResponse, runs_engine=True)
        content = {media_type.partition(";")[0]: {"schema": {"type": "string"}}}
        keywords["responses"][200] = {"description": "done", "content": content}
        return keywords

    def install(self, app: FastAPI, *, with_key: bool) -> None:
        """Make `app` serve the whole document."""

        def document() -> dict[str, Any]:
            if app.openapi_schema is None:
                app.openapi_schema = self._document(app, with_key)
            return app.openapi_schema

        app.openapi = document  # type: ignore[method-assign]

    def _document(self, app: FastAPI, with_key: bool) -> dict[str, Any]:
        schema = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        _, components = msgspec.json.schema_components(self._structs, ref_template=_TEMPLATE)
        schema["components"] = {"schemas": components}
        for operations in schema["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)  # FastAPI's own; ours are 400
        if with_key:
            schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            schema["security"] = [{"key": []}]
            schema["paths"]["/health"]["get"]["security"] = []
        return schema

    def _refer(self, struct: Any) -> dict[str, Any]:
        self._structs.append(struct)
        (reference,), _ = msgspec.json.schema_components([struct], ref_template=_TEMPLATE)
        return reference


def _stream(chunk: Any) -> str:
    return f"with stream=true: events `data: {chunk.__name__}`, then `data: [DONE]`"
