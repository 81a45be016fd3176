"""A circuit breaker for one worker: after failures in a row it is left alone, then tried with one request.

Pure: time comes in as an argument.
"""

from collections import deque
from typing import Literal

from kvrelay.types import RequestId

MAX_FAILURES = 5
WINDOW_S = 30.0
COOL_DOWN_S = 1.0
MAX_COOL_DOWN_S = 60.0

State = Literal["closed", "open", "half_open"]


class Breaker:
    """Closed until `MAX_FAILURES` failures within `WINDOW_S` without a success between them.

    Open, it lets nothing through for the cool-down, then one request at a time (half open): its success
    closes the breaker, its failure opens it again for twice as long.
    """

    def __init__(self) -> None:
        self._failed_s: deque[float] = deque(maxlen=MAX_FAILURES)
        self._cool_down_s = COOL_DOWN_S
        self._open_until_s: float | None = None
        self._probe: RequestId | None = None  # the request that decides, in half-open state

    def state(self, now_s: float) -> State:
        """Whether requests may go through."""
        if self._open_until_s is None:
            return "closed"
        return "open" if now_s < self._open_until_s else "half_open"

    def allows(self, now_s: float) -> bool:
        """Whether a request may be sent now."""
        state = self.state(now_s)
        return state == "closed" or (state == "half_open" and self._probe is None)

    def on_sent(self, request_id: RequestId, now_s: float) -> None:
        """A request was sent; the first in half-open state is the one that decides."""
        if self._probe is None and self.state(now_s) == "half_open":
            self._probe = request_id

    def on_success(self) -> None:
        """An attempt here worked."""
        self._failed_s.clear()
        self._open_until_s, self._cool_down_s, self._probe = None, COOL_DOWN_S, None

    def on_failure(self, request_id: RequestId, now_s: float) -> None:
        """An attempt here failed."""
        self._failed_s.append(now_s)
        if request_id == self._probe:
            self._cool_down_s = min(2 * self._cool_down_s, MAX_COOL_DOWN_S)
        elif len(self._failed_s) < MAX_FAILURES or self._failed_s[0] < now_s - WINDOW_S:
            return
        self._open_until_s, self._probe = now_s + self._cool_down_s, None

    def on_withdrawn(self, request_id: RequestId) -> None:
        """A request ended without a verdict (aborted, preempted); if it was to give one, the next does."""
        if request_id == self._probe:
            self._probe = None
