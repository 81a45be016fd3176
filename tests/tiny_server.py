"""A server over the tiny model in a thread of the test's process, on a port of its own."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvrelay.config import EngineConfig
from kvrelay.engine import Engine
from kvrelay.server.app import create_app
from kvrelay.server.run import DrainingServer, bind
from kvrelay.server_config import ServerConfig


@dataclass(frozen=True)
class Served:
    """A running server: where it is, and what is behind it."""

    url: str
    port: int
    engine: Engine
    server: DrainingServer


@contextmanager
def tiny_server(
    directory: Path, listening: dict[str, Any] | None = None, **settings: Any
) -> Iterator[Served]:
    """Serve the model at `directory` as `tiny`; `listening` are server settings, the others the engine's."""
    settings = {
        "transport": "inproc",
        "dtype": "float32",
        "num_kv_blocks": 64,
        "verify_kv": True,
        "served_model_name": "tiny",
        "threads_per_worker": 1,
        **settings,
    }
    config = ServerConfig.of(port=0, **(listening or {}))
    engine = Engine(EngineConfig.of(model=str(directory), **settings))
    try:
        listener = bind("127.0.0.1", 0)
        port = listener.getsockname()[1]
        server = DrainingServer(create_app(engine, config), config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        deadline_s = time.monotonic() + 20
        while not server.started:
            assert thread.is_alive()
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        yield Served(f"http://127.0.0.1:{port}", port, engine, server)
        server.handle_exit(0, None)
        thread.join(20)
        assert not thread.is_alive()
    finally:
        engine.close()


def wait_for_blocks(engine: Engine, timeout_s: float = 10.0) -> None:
    """Every block is back in its pool soon after the last request."""
    deadline_s = time.monotonic() + timeout_s
    while any(w.num_free_blocks != w.num_blocks for w in engine.report().workers):
        assert time.monotonic() < deadline_s, engine.report().workers
        time.sleep(0.05)
