"""Requests that no pair of workers can take now: bounded, by priority and age, each with a deadline.

Pure: time comes in as an argument. Knows nothing of workers.
"""

from bisect import insort
from collections import deque
from collections.abc import Iterable

from kvrelay.errors import DeadlineExceeded, Overloaded
from kvrelay.router.request import RoutedRequest

RATE_OVER = 64  # departures that the retry hint is estimated from
MIN_RETRY_S, MAX_RETRY_S = 1.0, 60.0


class WaitingQueue:
    """The router's queue; `limit=None` bounds nothing.

    Only new requests are refused: one that comes back from a worker has its place by age whatever the limit.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._requests: list[RoutedRequest] = []
        self._departures_s: deque[float] = deque(maxlen=RATE_OVER)
        self.num_refused = self.num_dispatched = 0

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def first(self) -> RoutedRequest | None:
        """The request whose turn it is."""
        return self._requests[0] if self._requests else None

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens whose KV the waiting requests need."""
        return sum(request.num_prefill_tokens for request in self._requests)

    def check_room(self, now_s: float) -> None:
        """Raise `Overloaded`, with a time to try again after, when the queue is full."""
        if self._limit is None or len(self._requests) < self._limit:
            return
        self.num_refused += 1
        raise Overloaded(
            f"{len(self._requests)} requests wait already; max_queued_requests={self._limit}",
            retry_after_s=self.retry_after_s(now_s),
        )

    def add(self, request: RoutedRequest) -> None:
        """Queue a request by priority, then by age."""
        insort(self._requests, request, key=_order)

    def remove(self, request: RoutedRequest) -> None:
        """Forget a request, if it is here."""
        if request in self._requests:
            self._requests.remove(request)

    def on_dispatched(self, now_s: float) -> None:
        """A request left for the workers, whether or not it had to wait."""
        self._departures_s.append(now_s)
        self.num_dispatched += 1

    def retry_after_s(self, now_s: float) -> float:
        """Seconds in which what waits now will have left, at the rate of the last departures."""
        if len(self._departures_s) < 2:
            return MIN_RETRY_S
        rate = (len(self._departures_s) - 1) / max(now_s - self._departures_s[0], 1e-3)
        return min(max(len(self._requests) / rate, MIN_RETRY_S), MAX_RETRY_S)


def _order(request: RoutedRequest) -> tuple[int, int]:
    return (request.params.priority, request.arrival)


def overdue(requests: Iterable[RoutedRequest], now_s: float) -> list[tuple[RoutedRequest, DeadlineExceeded]]:
    """Requests for which nothing has been computed by their deadlines, each with the error it ends with."""
    late = [r for r in requests if r.deadline_s is not None and r.deadline_s <= now_s and not r.has_begun]
    return [(request, _deadline_error(request, now_s)) for request in late]


def _deadline_error(request: RoutedRequest, now_s: float) -> DeadlineExceeded:
    where = "in the queue" if request.decode is None else f"for blocks on {request.decode} or for prefill"
    waited_s = now_s - request.ledger.arrived_s
    return DeadlineExceeded(f"the request waited {waited_s:.3g} s, the last of it {where}, and had not begun")
