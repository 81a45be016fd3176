"""Settings of the HTTP server, validated by raising. Knows nothing of HTTP itself."""

import ipaddress
from typing import Any

import msgspec

from kvrelay.config import api_key, convert
from kvrelay.errors import InvalidConfig
from kvrelay.field_checks import check_at_least, check_seconds


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The HTTP server: where it listens, who may use it, and how much one request may bring.

    `api_key=None` takes that of `KVRELAY_API_KEY`.
    A client has `header_timeout_s` and `body_timeout_s` to send a request; `drain_timeout_s` is how long
    requests may go on after a signal to stop.

    Raises `InvalidConfig`, naming the field.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    max_body_bytes: int = 8 * 1024 * 1024
    max_headers: int = 100
    max_header_bytes: int = 64 * 1024
    header_timeout_s: float = 30.0
    body_timeout_s: float = 60.0
    drain_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        if self.api_key is None:
            msgspec.structs.force_setattr(self, "api_key", api_key())
        if self.api_key == "":
            raise InvalidConfig("api_key='': expected at least one character")
        if not 0 <= self.port <= 65535:
            raise InvalidConfig(f"port={self.port}: expected 0 to 65535")
        for field in ("max_body_bytes", "max_headers", "max_header_bytes"):
            check_at_least(field, getattr(self, field), 1)
        for field in ("header_timeout_s", "body_timeout_s", "drain_timeout_s"):
            check_seconds(field, getattr(self, field))
        if self.api_key is None and not is_loopback(self.host):
            raise InvalidConfig(
                f"host={self.host!r}: other machines could use the server; give an api_key, or listen "
                "on 127.0.0.1"
            )

    @classmethod
    def of(cls, /, **settings: Any) -> "ServerConfig":
        """From keyword settings, types checked. Raises `InvalidConfig` naming the field and what exists."""
        return convert(cls, settings)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
