"""The control plane's only codec: a closed union of messages in each direction, as msgpack.

Unknown input raises `ProtocolError`; nothing from the network is ever unpickled.
"""

from typing import Any

import msgspec

from kvrelay import wire
from kvrelay.errors import ProtocolError

MAX_MESSAGE_BYTES = 64 * 1024 * 1024

_ROUTER_TO_WORKER = (
    wire.Connect | wire.Reserve | wire.Prefill | wire.Abort | wire.Wanted | wire.WriterGone | wire.Shutdown
)
_WORKER_TO_ROUTER = (
    wire.Hello
    | wire.StartFailed
    | wire.Connected
    | wire.Reserved
    | wire.Mark
    | wire.PromptScored
    | wire.StepReport
    | wire.Preempted
    | wire.AttemptFailed
    | wire.Wanted
    | wire.WriterGone
    | wire.Heartbeat
    | wire.CacheChanged
    | wire.Stopped
)

_encoder = msgspec.msgpack.Encoder()
_decoders: dict[str, msgspec.msgpack.Decoder[Any]] = {
    "router_to_worker": msgspec.msgpack.Decoder(_ROUTER_TO_WORKER),
    "worker_to_router": msgspec.msgpack.Decoder(_WORKER_TO_ROUTER),
    "notification": msgspec.msgpack.Decoder(wire.Notification),
}


def encode(message: wire.Message) -> bytes:
    """Message to msgpack bytes."""
    return _encoder.encode(message)


def decode(data: bytes, direction: str) -> Any:
    """Bytes to a message of one direction's union: `router_to_worker`, `worker_to_router`, `notification`.

    Raises `ProtocolError` on anything else, over-long input included.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"message of {len(data)} bytes; at most {MAX_MESSAGE_BYTES}")
    try:
        return _decoders[direction].decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ProtocolError(f"{direction}: {error}") from error
