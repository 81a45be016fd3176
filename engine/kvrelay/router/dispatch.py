"""Whose turn it is, and where to: the queue, the fleet and the policy put together. Pure."""

from kvrelay.errors import KVRelayError
from kvrelay.router.admission import WaitingQueue
from kvrelay.router.fleet import Fleet
from kvrelay.router.load import Pair
from kvrelay.router.policies import Policy
from kvrelay.router.request import RoutedRequest


def may_begin(request: RoutedRequest, fleet: Fleet, now_s: float) -> bool:
    """Whether there is nothing to wait for: a pair can take the request now, or none ever will."""
    return fleet.why_never(request) is not None or bool(fleet.pairs(request, fleet.job(request), now_s))


def next_start(
    queue: WaitingQueue, fleet: Fleet, policy: Policy, now_s: float
) -> tuple[RoutedRequest, Pair | KVRelayError] | None:
    """Take the first request off the queue, with its pair, or with why it can never have one.

    None while it has to wait; those behind it wait too, so that none is overtaken for ever.
    """
    request = queue.first
    if request is None:
        return None
    found: Pair | KVRelayError | None = fleet.why_never(request)
    if found is None:
        job = fleet.job(request)
        pairs = fleet.pairs(request, job, now_s)
        found = policy.choose(job, pairs) if pairs else None
    if found is None:
        return None
    queue.remove(request)
    return request, found
