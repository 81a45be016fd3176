"""What every request passes before anything is read of it: header limits, host or key, the body's length.

Also gives every response the request's id and trace. Plain ASGI, so that streams pass through untouched.
"""

import base64
import binascii
import hmac
import uuid
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvrelay.server.body import IS_READ, has_body, throw_away
from kvrelay.server.errors import Refused, error_response
from kvrelay.server_config import ServerConfig, is_loopback

OPEN_PATHS = ("/health",)
MAX_ID_CHARACTERS = 256
CARRIED = "kvrelay.carried"  # where the scope holds the headers that go back
REQUEST_ID = "kvrelay.request_id"
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
        scope[CARRIED], scope[REQUEST_ID] = carried, request_id
        answer = _answering(scope, receive, send, has_body(headers))
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
        if self._key is None:
            _check_host(headers.get("host", "localhost"))
        elif scope["path"] not in OPEN_PATHS:
            self._check_key(scope["path"], headers.get("authorization", ""))
        if request_id and not _is_plain(request_id):
            raise Refused(400, f"x-request-id: expected 1 to {MAX_ID_CHARACTERS} printable ASCII characters")
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._config.max_body_bytes:
            raise Refused(413, f"the body has {length} bytes; at most {self._config.max_body_bytes}")

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


def _check_host(host: str) -> None:
    """Without a key, only programs of this machine: not a foreign page whose own name now leads here."""
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        name = None
    if name is None or not is_loopback(name):
        message = f"host={host!r}: without an API key only names of this machine are answered: localhost"
        raise Refused(403, message, code="host_not_allowed")


def _answering(scope: Scope, receive: Receive, send: Send, with_body: bool) -> Send:
    """`send` for one request. An answer before the whole body ends the connection, but not at once."""
    is_early = False

    async def answer(message: Message) -> None:
        nonlocal is_early
        if message["type"] == "http.response.start":
            is_early = with_body and IS_READ not in scope
            closing = [(b"connection", b"close")] if is_early else []
            message["headers"] = [*message.get("headers", []), *scope[CARRIED], *closing]
        elif is_early and not message.get("more_body", False):
            await send({**message, "more_body": True})
            await throw_away(receive)
            message = {"type": "http.response.body", "body": b""}
        await send(message)

    return answer


def _password(credentials: bytes) -> bytes:
    try:
        return base64.b64decode(credentials, validate=True).partition(b":")[2]
    except binascii.Error:
        return b""


def _is_plain(text: str) -> bool:
    return 0 < len(text) <= MAX_ID_CHARACTERS and text.isascii() and text.isprintable()
