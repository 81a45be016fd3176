"""Reads a request's body within its limits: type, bytes and time."""

import asyncio

from fastapi import Request
from starlette.requests import ClientDisconnect

from kvrelay.server.errors import Refused
from kvrelay.server.generation import ClientGone
from kvrelay.server_config import ServerConfig


async def read_body(request: Request, config: ServerConfig) -> bytes:
    """The whole body. Raises `Refused` when it is not JSON by name, too long, or too slow."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a browser cannot send this to a foreign site without asking first
        raise Refused(415, f"content-type={kind!r}: expected application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(config.body_timeout_s):
            async for piece in request.stream():
                body += piece
                if len(body) > config.max_body_bytes:
                    raise Refused(
                        413,
                        f"the body has more than {config.max_body_bytes} bytes",
                        headers={"Connection": "close"},
                    )
    except TimeoutError:
        raise Refused(
            408,
            f"the body did not arrive within {config.body_timeout_s:g} s",
            headers={"Connection": "close"},
        ) from None
    except ClientDisconnect:
        raise ClientGone from None
    return bytes(body)
