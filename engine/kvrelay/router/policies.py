"""How a request's (prefill, decode) pair is chosen; one line in `POLICIES` per policy."""

from collections.abc import Sequence
from importlib import import_module
from typing import Protocol

from kvrelay.errors import UnknownName
from kvrelay.router.load import Job, Load, Pair
from kvrelay.types import WorkerId

POLICIES = {
    "auto": "kvrelay.router.policies:Auto",
    "energy_aware": "kvrelay.router.policies:EnergyAware",
    "least_loaded": "kvrelay.router.policies:LeastLoaded",
    "prefix_aware": "kvrelay.router.policies:PrefixAware",
    "round_robin": "kvrelay.router.policies:RoundRobin",
}


class Policy(Protocol):
    """Chooses among the pairs that can take the request now; there is always at least one."""

    def choose(self, job: Job, pairs: Sequence[Pair]) -> Pair:
        """The pair that gets the request: one of `pairs`."""


class RoundRobin:
    """The worker whose turn is longest ago, decode first, whatever it has to do."""

    def __init__(self) -> None:
        self._turns: dict[WorkerId, int] = {}
        self._num_turns = 0

    def choose(self, job: Job, pairs: Sequence[Pair]) -> Pair:
        chosen = min(pairs, key=lambda pair: (self._turn(pair.decode), self._turn(pair.prefill)))
        self._num_turns += 1
        for load in (chosen.prefill, chosen.decode):
            self._turns[load.worker_id] = self._num_turns
        return chosen

    def _turn(self, load: Load) -> int:
        return self._turns.get(load.worker_id, 0)


class LeastLoaded:
    """Fewest requests on decode, then fewest prompt tokens waiting for prefill; the first of equals."""

    def choose(self, job: Job, pairs: Sequence[Pair]) -> Pair:
        return min(pairs, key=_load)


class PrefixAware:
    """Fewest prompt tokens to compute before the first token: those waiting, and its own not yet cached.

    Among equals the decode worker with the fewest requests, then the one that has more of the prompt.
    With nothing cached anywhere, that is the least loaded prefill worker.
    """

    def choose(self, job: Job, pairs: Sequence[Pair]) -> Pair:
        def key(pair: Pair) -> tuple[int, int, int]:
            waiting = pair.prefill.num_prefill_tokens + pair.num_tokens_to_compute(job)
            return (waiting, pair.decode.num_requests, -pair.decode.num_cached_tokens(job.block_hashes))

        return min(pairs, key=key)


class EnergyAware:
    """Least predicted joules among the pairs predicted to keep the SLO; the soonest where none does.

    A pair whose joules are not known yet is tried first, so that they become known. Without an SLO every
    pair keeps it. Predictions are `Pair.joules`, `Pair.ttft_s` and `Pair.itl_s`.
    """

    def choose(self, job: Job, pairs: Sequence[Pair]) -> Pair:
        kept = [pair for pair in pairs if pair.keeps_slo(job)]
        if not kept:
            return min(pairs, key=lambda pair: _sooner(pair, job))
        return min(kept, key=lambda pair: (pair.joules(job) or 0.0, *_load(pair)))  # unknown: as if none


class Auto:
    """`energy_aware` where joules are known of all pairs and an SLO is set, else `prefix_aware` where a
    worker has part of the prompt cached, else `least_loaded`. `taken` counts what it took."""

    def __init__(self) -> None:
        self._policies: dict[str, Policy] = {
            "energy_aware": EnergyAware(),
            "prefix_aware": PrefixAware(),
            "least_loaded": LeastLoaded(),
        }
        self.taken = dict.fromkeys(self._policies, 0)

    def choose(self, job: Job, pairs: Sequence[Pair]) -> Pair:
        name = self._name(job, pairs)
        self.taken[name] += 1
        return self._policies[name].choose(job, pairs)

    def _name(self, job: Job, pairs: Sequence[Pair]) -> str:
        has_slo = job.slo_ttft_s is not None or job.slo_itl_s is not None
        if has_slo and all(pair.joules(job) is not None for pair in pairs):
            return "energy_aware"
        is_cached = any(pair.prefill.num_cached_tokens(job.block_hashes) for pair in pairs)
        return "prefix_aware" if is_cached else "least_loaded"


def open_policy(name: str) -> Policy:
    """The policy of that name. Raises `UnknownName`, listing those that exist."""
    if name not in POLICIES:
        raise UnknownName(f"policy={name!r}: expected one of {', '.join(sorted(POLICIES))}")
    module, _, attribute = POLICIES[name].partition(":")
    policy: Policy = getattr(import_module(module), attribute)()
    return policy


def _load(pair: Pair) -> tuple[int, int]:
    return (pair.decode.num_requests, pair.prefill.num_prefill_tokens)


def _sooner(pair: Pair, job: Job) -> tuple[float, float, int, int]:
    """Order by predicted time to first token, then by predicted gap, then by load."""
    return (pair.ttft_s(job) or 0.0, pair.itl_s() or 0.0, *_load(pair))
