"""What the routes share: the engine, its settings, and whether the server is on its way out."""

import asyncio
import time
from dataclasses import dataclass, field

from kvrelay.engine import Engine
from kvrelay.server.errors import Refused
from kvrelay.server.generation import EventBridge
from kvrelay.server_config import ServerConfig


@dataclass(slots=True)
class Service:
    """One running server; `draining` is set when it takes no more requests.

    `reading` has the time limits of bodies that are on their way.
    """

    engine: Engine
    config: ServerConfig
    created: int = field(default_factory=lambda: int(time.time()))
    draining: asyncio.Event = field(default_factory=asyncio.Event)
    reading: set[asyncio.Timeout] = field(default_factory=set)
    bridge: EventBridge = field(init=False)

    @property
    def model_name(self) -> str:
        """The name that clients use; that of the settings is taken too."""
        return self.engine.config.served_name()

    def check_model(self, asked: str | None) -> None:
        """Raise 404 for a model that is not the one served; none at all means that one."""
        if asked is not None and asked not in (self.model_name, self.engine.config.model):
            message = f"model={asked!r}: it is not served here; {self.model_name!r} is"
            raise Refused(404, message, code="model_not_found")
