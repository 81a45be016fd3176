"""The server's process: its address first, then the engine, then requests, until a signal says stop.

Knows sockets, signals and uvicorn. Knows nothing of documents.
"""

import asyncio
import logging
import math
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import uvicorn
from fastapi import FastAPI

from kvrelay.config import EngineConfig
from kvrelay.engine import Engine
from kvrelay.errors import EngineClosed, InvalidConfig
from kvrelay.server.app import create_app
from kvrelay.server.connection import limited_connection
from kvrelay.server.service import Service
from kvrelay.server_config import ServerConfig

SWITCH_S = 0.0005  # how long the router's thread may keep the server's waiting, or the other way round
KEEP_ALIVE_S = 75  # longer than clients keep idle connections, so that none is closed while it is being used
BACKLOG = 2048
GRACE_S = 2  # for those who are told at the end of a drain that it is the end
MAX_FILES = 65_536  # every connection is one; many systems let a process have 1,024 unless it asks
logger = logging.getLogger("kvrelay")


def serve(engine_config: EngineConfig, config: ServerConfig, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; then finish what runs, up to `drain_timeout_s`, and return.

    `say` gets one line once requests are served. Raises what the engine raises when it cannot start, and
    `InvalidConfig` when the address is taken.
    """
    sys.setswitchinterval(SWITCH_S)
    listener = bind(config.host, config.port)
    with listener:
        engine = Engine(engine_config)
        try:
            app = create_app(engine, config)
            line = f"{_what(engine, app.state.service)} at {url(config.host, listener)}"
            DrainingServer(app, config, on_listening=lambda: say(line)).run(sockets=[listener])
        finally:
            engine.close()


def bind(host: str, port: int) -> socket.socket:
    """A socket on the address, not listening yet. Raises `InvalidConfig` when it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise InvalidConfig(f"host={host!r}, port={port}: cannot listen there: {error.strerror}") from error
    return listener


def allow_files() -> None:
    """Let this process open as many files as it may, up to `MAX_FILES`; some systems refuse below `most`."""
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if most == resource.RLIM_INFINITY else min(MAX_FILES, most)
    if allowed != resource.RLIM_INFINITY and allowed < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def url(host: str, listener: socket.socket) -> str:
    """Where clients find the socket."""
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{listener.getsockname()[1]}"


class DrainingServer(uvicorn.Server):
    """uvicorn, told of limits, that ends quietly on a signal: requests in flight finish first.

    `on_listening` is called once connections are taken.
    """

    def __init__(
        self, app: FastAPI, config: ServerConfig, on_listening: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=limited_connection(config),
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=math.ceil(config.drain_timeout_s) + GRACE_S,
                server_header=False,
                proxy_headers=False,  # nothing here asks who the client says it is
            )
        )
        self._service: Service = app.state.service
        self._on_listening = on_listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, with room for connections; then says so."""
        allow_files()
        await super().startup(sockets)
        if self.started:
            self._on_listening()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, but what has not ended in time ends with an error of ours before it is cancelled."""
        loop, service = asyncio.get_running_loop(), self._service
        error = EngineClosed(f"the server shut down, and waited {service.config.drain_timeout_s:g} s for it")
        late = loop.call_later(service.config.drain_timeout_s, service.engine.fail_all, error)
        for limit in service.reading:  # nothing has begun of those requests: they are not waited for
            if not limit.expired():
                limit.reschedule(loop.time())
        try:
            await super().shutdown(sockets)
        finally:
            late.cancel()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Unlike uvicorn's, does not raise the signal again: having drained is a normal end."""
        if threading.current_thread() is not threading.main_thread():  # only that one may
            yield
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain. Second: leave at once."""
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True
        self._service.draining.set()


def _what(engine: Engine, service: Service) -> str:
    config = engine.config
    roles = [role for _, role in config.roles()]
    workers = " + ".join(f"{roles.count(role)} {role}" for role in dict.fromkeys(roles))
    return f"{service.model_name} ({workers}) is served"
