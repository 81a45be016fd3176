"""One client's connection: uvicorn's, with limits to what is no body, in bytes and in time."""

from asyncio import TimerHandle, Transport

import msgspec
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from kvrelay.server.errors import Refused, error_body
from kvrelay.server_config import ServerConfig


class LimitedConnection(HttpToolsProtocol):
    """Refuses a head or trailers that are too large while they still arrive, and closes a head that does not.

    Trailers are dropped: nobody here reads them.
    """

    limits: ServerConfig
    _is_in_head = True
    _num_head_bytes = 0  # since the last head was whole or the last piece of a body came
    _head_timer: TimerHandle | None = None
    _running: RequestResponseCycle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        if self._running is not None:  # uvicorn tells the request that came last, not the one that runs
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def data_received(self, data: bytes) -> None:
        self._num_head_bytes += len(data)
        super().data_received(data)
        if self._num_head_bytes > self.limits.max_header_bytes:
            part = "head" if self._is_in_head else "trailer"
            message = f"the request's {part} has more than {self.limits.max_header_bytes} bytes"
            self._refuse(Refused(431, message))
        elif self._head_timer is None and self._is_idle():  # uvicorn's own timer ends with any byte
            self._wait_for_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head = True
        if self._head_timer is None:
            self._wait_for_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._stop_waiting()
        self._is_in_head, self._num_head_bytes = False, 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._num_head_bytes = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(Refused(400, msg))

    def _refuse(self, error: Refused) -> None:
        if self.transport.is_closing():
            return
        if self._can_answer():
            status, document = error_body(error)
            content = msgspec.json.encode(document)
            head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
            self.transport.write(STATUS_LINE[status] + head % len(content) + content)
        self.transport.close()

    def _can_answer(self) -> bool:
        """Whether an answer now would be that of the request that cannot be read, not of one before it."""
        running = self._running
        if running is None or running.response_complete:
            return True
        return running.more_body and not running.response_started

    def _is_idle(self) -> bool:
        """Whether no request runs."""
        return self._running is None or self._running.response_complete

    def _wait_for_head(self) -> None:
        self._head_timer = self.loop.call_later(self.limits.header_timeout_s, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def limited_connection(config: ServerConfig) -> type[LimitedConnection]:
    """The protocol class of a server with these limits."""
    return type("LimitedConnection", (LimitedConnection,), {"limits": config})
