"""As little of an HTTP server as can stream answers: what is left when all but HTTP itself is taken away.

No routes, no checks, no usage, and a request that fails ends its connection: `server_overhead.py` measures
beside it what ours adds to that.
"""

import asyncio
import json
import re
import threading
from contextlib import suppress
from typing import Any

import uvloop

from kvrelay import SamplingParams
from kvrelay.engine import Engine
from kvrelay.outputs import StreamEvent


def start_bare_server(engine: Engine) -> int:
    """Serve `engine` on a thread that ends with the process; the port."""
    ports: list[int] = []
    is_listening = threading.Event()

    async def serve() -> None:
        server = await asyncio.start_server(
            lambda reader, writer: _connection(engine, reader, writer), "127.0.0.1", 0
        )
        ports.append(server.sockets[0].getsockname()[1])
        is_listening.set()
        await server.serve_forever()

    threading.Thread(target=lambda: uvloop.run(serve()), daemon=True).start()
    is_listening.wait()
    return ports[0]


async def _connection(engine: Engine, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                (length,) = re.findall(rb"content-length: (\d+)", head)
                await _answer(engine, json.loads(await reader.readexactly(int(length))), writer)
    finally:
        writer.close()


async def _answer(engine: Engine, asked: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    loop, events = asyncio.get_running_loop(), asyncio.Queue[StreamEvent]()
    params = SamplingParams(max_tokens=asked["max_tokens"], temperature=0.0, ignore_eos=True)
    engine.submit(
        engine.prepare(asked["prompt"], params), lambda e: loop.call_soon_threadsafe(events.put_nowait, e)
    )
    is_over, head = False, b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    while not is_over:
        event = await events.get()
        if event.error is not None:
            raise event.error
        is_over = event.output is not None
        document: dict[str, Any] = {"text": event.text}
        if event.output is not None:
            document["ttft_s"] = event.output.timings.ttft_s
        if event.token_ids or is_over:
            writer.write(head + _chunk(json.dumps(document, separators=(",", ":")).encode()))
            head = b""
    writer.write(_chunk(b"[DONE]") + b"0\r\n\r\n")


def _chunk(data: bytes) -> bytes:
    return b"%x\r\ndata: %s\n\n\r\n" % (len(data) + 8, data)
