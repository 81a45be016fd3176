"""Reads a request's body within its limits, type, bytes and time, or what is left of one that is refused."""

import asyncio
from contextlib import suppress

from fastapi import Request
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from kvrelay.errors import EngineClosed
from kvrelay.server.errors import Refused
from kvrelay.server.generation import ClientGone
from kvrelay.server.service import Service

IS_READ = "kvrelay.is_read"  # in the scope once all of the body has come
LINGER_S, LINGER_BYTES = 2.0, 2**26  # how much of a refused body is still read


async def read_body(request: Request, service: Service) -> bytes:
    """The whole body. Raises `Refused` when it is not JSON by name, too long, or too slow; `EngineClosed`
    when the server begins to shut down meanwhile.
    """
    config = service.config
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a browser cannot send this to a foreign site without asking first
        raise Refused(415, f"content-type={kind!r}: expected application/json")
    body, limit = bytearray(), asyncio.timeout(config.body_timeout_s)
    service.reading.add(limit)
    try:
        async with limit:
            async for piece in request.stream():
                body += piece
                if len(body) > config.max_body_bytes:
                    raise Refused(413, f"the body has more than {config.max_body_bytes} bytes")
    except TimeoutError:
        if service.draining.is_set():
            raise EngineClosed("the server is shutting down") from None
        raise Refused(408, f"the body did not arrive within {config.body_timeout_s:g} s") from None
    except ClientDisconnect:
        raise ClientGone from None
    finally:
        service.reading.discard(limit)
    request.scope[IS_READ] = True
    return bytes(body)


def has_body(headers: Headers) -> bool:
    """Whether a body comes with these headers."""
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers


async def throw_away(receive: Receive) -> None:
    """Read what still comes of a body that is refused, for a moment: a connection that is closed before all
    of it was read takes the answer along."""
    num_bytes = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while (message := await receive()).get("more_body") and num_bytes < LINGER_BYTES:
                num_bytes += len(message["body"])
