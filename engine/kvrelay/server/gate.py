"""What every request passes before anything is read of it: header limits, the key, the body's length.

Also gives every response the request's id and trace. Plain ASGI, so that streams pass through untouched.
"""

import base64
import binascii
import hmac
import uuid

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvrelay.server.errors import Refused, error_response
from kvrelay.server_config import ServerConfig

OPEN_PATHS = ("/health",)
MAX_ID_CHARACTERS = 256
CARRIED = "kvrelay.carried"  # where the scope holds the headers that go back
_ECHOED = ("traceparent", "tracestate")


class Gate:
    """ASGI middleware in front of every route."""

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app, self._config = app, config
        self._key = config.api_key.encode() if config.api_key is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _is_plain(given) else uuid.uuid4().hex
        carried = [(b"x-request-id", request_id.encode())]
        carried += [(n.encode(), headers[n].encode()) for n in _ECHOED if _is_plain(headers.get(n, ""))]

        scope[CARRIED] = carried

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *carried]
            await send(message)

        try:
            self._check(scope, headers, given)
        except Refused as error:
            await error_response(error)(scope, receive, answer)
            return
        await self._app(scope, receive, answer)

    def _check(self, scope: Scope, headers: Headers, request_id: str) -> None:
        limit = self._config.max_headers
        if len(scope["headers"]) > limit:
            raise Refused(431, f"{len(scope['headers'])} headers; at most {limit}")
        if self._key is not None and scope["path"] not in OPEN_PATHS:
            self._check_key(scope["path"], headers.get("authorization", ""))
        if request_id and not _is_plain(request_id):
            raise Refused(400, f"x-request-id: expected 1 to {MAX_ID_CHARACTERS} printable ASCII characters")
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._config.max_body_bytes:
            raise Refused(
                413,
                f"the body has {length} bytes; at most {self._config.max_body_bytes}",
                headers={"Connection": "close"},
            )

    def _check_key(self, path: str, authorization: str) -> None:
        """`Bearer KEY`, or a browser's password dialog (`Basic`, any user name)."""
        assert self._key is not None
        scheme, _, given = authorization.partition(" ")
        key = given.strip().encode("latin-1")  # as ASGI decodes headers
        if scheme.lower() == "basic":
            key = _password(key)
        if scheme.lower() not in ("bearer", "basic") or not hmac.compare_digest(key, self._key):
            message = (
                "the API key is wrong" if authorization else "an API key is needed: Authorization: Bearer"
            )
            scheme = 'Basic realm="kvrelay", charset="UTF-8"' if path == "/" else "Bearer"
            raise Refused(401, message, code="invalid_api_key", headers={"WWW-Authenticate": scheme})


def _password(credentials: bytes) -> bytes:
    try:
        return base64.b64decode(credentials, validate=True).partition(b":")[2]
    except binascii.Error:
        return b""


def _is_plain(text: str) -> bool:
    return 0 < len(text) <= MAX_ID_CHARACTERS and text.isascii() and text.isprintable()
