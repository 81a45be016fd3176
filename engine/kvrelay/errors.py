"""The error tree. Each message says what was needed, what there was, and which field.

Every error a user can meet derives from `KVRelayError`; the wire carries an error as its class name
(`ERRORS`) and its message, so that the client raises what the worker raised.
"""


class KVRelayError(Exception):
    """Root of everything kvrelay raises on purpose."""


class InvalidRequest(KVRelayError, ValueError):
    """The request itself is wrong: empty or over-long prompt, token id out of range, bad parameter."""


class InvalidConfig(KVRelayError, ValueError):
    """A setting is wrong; the message names the field."""


class UnknownName(InvalidConfig):
    """A name that is in no table; the message lists what exists."""


class ModelError(KVRelayError):
    """The model is missing, corrupt or of an architecture we do not run; the message names the file."""


class ContextLengthExceeded(InvalidRequest):
    """Prompt and answer together are longer than the model's context."""


class PoolTooSmall(InvalidRequest):
    """One request needs more KV blocks than the whole pool has."""


class Overloaded(KVRelayError):
    """No room now; try again after `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(KVRelayError):
    """The request had not begun by its deadline: too many were ahead of it."""


class ProtocolError(KVRelayError):
    """A message that is not in the closed union, or arrives in a state that has no place for it."""


class TransportError(KVRelayError):
    """The data plane failed: a write, a handshake, a notification."""


class LayoutMismatch(TransportError):
    """Two workers whose KV caches do not have the same layout were paired."""


class TransferFailed(TransportError):
    """The KV of one request did not arrive whole."""


class LeaseExpired(TransferFailed):
    """The writer of a request's KV was silent for a whole lease."""


class WorkerFailed(KVRelayError):
    """A worker process did not start, or died; the message carries the reason from its own log."""


class NoWorker(WorkerFailed):
    """No worker of a role is alive, so that nothing can be served."""


class EngineClosed(KVRelayError):
    """The engine was closed while, or before, the request ran."""


class EnergyUnavailable(KVRelayError):
    """An energy meter that was asked for by name cannot be read here; the message says why."""


def _tree(root: type[KVRelayError]) -> dict[str, type[KVRelayError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


ERRORS = _tree(KVRelayError)
