"""Real requests of the router's own: to verify a worker in a new role, to measure a way through the pool."""

from collections.abc import Callable

from kvrelay.router.core import Router
from kvrelay.router.request import RoutedRequest, Update
from kvrelay.sampling_params import MAX_INTEGER, SamplingParams
from kvrelay.types import BLOCK_SIZE, RequestId, WorkerId

PROBE_TOKENS = BLOCK_SIZE + 2  # so that a full KV block moves, and a part of one
MAX_NEW_TOKENS = 2

OnEnd = Callable[[RoutedRequest, Update], None]


class Probes:
    """Sends requests over one pair of workers only, ahead of all others, and keeps their news apart."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._waiting: dict[RequestId, tuple[RoutedRequest, OnEnd]] = {}

    def send(self, name: str, pair: tuple[WorkerId, WorkerId], now_s: float, on_end: OnEnd) -> RequestId:
        """Start one; `on_end` gets its last update. `name` must be new: nothing cached fits it then."""
        smallest = min(self._router.fleet.loads[worker_id].num_blocks for worker_id in pair)
        num_tokens = min(PROBE_TOKENS, smallest * BLOCK_SIZE - MAX_NEW_TOKENS)
        request = RoutedRequest(
            request_id=RequestId(f"probe-{name}"),
            arrival=-1,
            params=SamplingParams(
                max_tokens=MAX_NEW_TOKENS,
                temperature=0.0,
                ignore_eos=True,
                priority=-MAX_INTEGER,
                cache_salt=name,
            ),
            seed=0,
            token_ids=[0] * num_tokens,
            num_prompt_tokens=num_tokens,
            max_total_tokens=num_tokens + MAX_NEW_TOKENS,
            pinned=pair,
        )
        self._waiting[request.request_id] = (request, on_end)
        self._router.submit(request, now_s)
        return request.request_id

    def on_update(self, update: Update) -> bool:
        """Take the news of a probe; False when it is somebody else's request."""
        found = self._waiting.get(update.request_id)
        if found is None:
            return False
        if update.error is not None or update.finish_reason is not None:
            request, on_end = self._waiting.pop(update.request_id)
            on_end(request, update)
        return True
