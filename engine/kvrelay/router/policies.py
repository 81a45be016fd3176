"""How a request's (prefill, decode) pair is chosen; one line in `POLICIES` per policy."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Protocol

from kvrelay.errors import UnknownName
from kvrelay.types import WorkerId

POLICIES = {
    "round_robin": "kvrelay.router.policies:RoundRobin",
    "least_loaded": "kvrelay.router.policies:LeastLoaded",
}


@dataclass(slots=True)
class Load:
    """What the router has given one worker and not got back: prompt tokens to prefill, requests to decode.

    `cached` holds the names (`cache.prefix.block_hashes`) of the blocks that the worker said it has cached.
    """

    worker_id: WorkerId
    num_prefill_tokens: int = 0
    num_requests: int = 0
    cached: set[bytes] = field(default_factory=set)

    def change_cached(self, added: Sequence[bytes], removed: Sequence[bytes]) -> None:
        """The worker's prefix cache changed."""
        self.cached.difference_update(removed)
        self.cached.update(added)


class Policy(Protocol):
    """Chooses among living workers; no list is empty. Colocated, decode's choice holds for both."""

    def prefill(self, workers: Sequence[Load]) -> WorkerId:
        """The worker that computes the prompt."""

    def decode(self, workers: Sequence[Load]) -> WorkerId:
        """The worker that generates."""


class RoundRobin:
    """Each worker in turn, whatever it has to do."""

    def __init__(self) -> None:
        self._num_prefills = 0
        self._num_decodes = 0

    def prefill(self, workers: Sequence[Load]) -> WorkerId:
        self._num_prefills += 1
        return workers[(self._num_prefills - 1) % len(workers)].worker_id

    def decode(self, workers: Sequence[Load]) -> WorkerId:
        self._num_decodes += 1
        return workers[(self._num_decodes - 1) % len(workers)].worker_id


class LeastLoaded:
    """Fewest prompt tokens waiting for prefill, fewest requests for decode; the first of equals."""

    def prefill(self, workers: Sequence[Load]) -> WorkerId:
        return min(workers, key=lambda load: load.num_prefill_tokens).worker_id

    def decode(self, workers: Sequence[Load]) -> WorkerId:
        return min(workers, key=lambda load: load.num_requests).worker_id


def open_policy(name: str) -> Policy:
    """The policy of that name. Raises `UnknownName`, listing those that exist."""
    if name not in POLICIES:
        raise UnknownName(f"policy={name!r}: expected one of {', '.join(sorted(POLICIES))}")
    module, _, attribute = POLICIES[name].partition(":")
    policy: Policy = getattr(import_module(module), attribute)()
    return policy
