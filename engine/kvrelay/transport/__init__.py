"""The data plane: how one worker's KV pages reach another's.

`TRANSPORTS` is the whole registry: a new transport is one file and one line here, and the conformance suite
(`tests/engine/test_transport_conformance.py`) then runs on it. `shm:gbit_per_s=1` is `shm` at the pace of
such a link, to try out what a network slower than the host's memory would do.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvrelay.errors import InvalidConfig, UnknownName

if TYPE_CHECKING:
    from kvrelay.transport.base import Site, Transport

TRANSPORTS = {
    "inproc": "kvrelay.transport.inproc:InprocTransport",
    "shm": "kvrelay.transport.shm:ShmTransport",
    "nixl": "kvrelay.transport.nixl:NixlTransport",
    "faulty": "kvrelay.transport.faulty:FaultyTransport",
}


def parse_transport(spec: str) -> tuple[str, dict[str, str]]:
    """`name` or `name:key=value,key=value` to the name and its options.

    Raises `UnknownName` for a name that is not in `TRANSPORTS`, `InvalidConfig` for a malformed option.
    """
    name, _, tail = spec.partition(":")
    if name not in TRANSPORTS:
        raise UnknownName(f"transport={name!r}: expected one of {', '.join(sorted(TRANSPORTS))}")
    options = {}
    for item in filter(None, tail.split(",")):
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise InvalidConfig(f"transport={spec!r}: {item!r} is not key=value")
        options[key] = value
    return name, options


def is_in_process(spec: str) -> bool:
    """Whether the workers of this transport must share one process (they run as threads then)."""
    name, options = parse_transport(spec)
    inner, _ = parse_transport(options["inner"]) if "inner" in options else ("", {})
    return "inproc" in (name, inner)


def open_transport(spec: str, site: "Site") -> "Transport":
    """The transport that `spec` names, opened for one worker. Raises what its constructor raises."""
    name, options = parse_transport(spec)
    module, _, attribute = TRANSPORTS[name].partition(":")
    factory: Any = getattr(import_module(module), attribute)
    transport: Transport = factory(site, options)
    return transport
