"""A circuit breaker for one worker: after failures in a row it is left alone, then tried with one request.

Pure: time comes in as an argument.
"""

from collections import deque
from typing import Literal

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
        self._is_probing = False
        self.num_openings = 0

    def state(self, now_s: float) -> State:
        """Whether requests may go through."""
        if self._open_until_s is None:
            return "closed"
        return "open" if now_s < self._open_until_s else "half_open"

    def allows(self, now_s: float) -> bool:
        """Whether a request may be sent now."""
        state = self.state(now_s)
        return state == "closed" or (state == "half_open" and not self._is_probing)

    def on_sent(self, now_s: float) -> None:
        """A request was sent; in half-open state it is the one that decides."""
        self._is_probing = self.state(now_s) == "half_open"

    def on_success(self) -> None:
        """An attempt here worked."""
        self._failed_s.clear()
        self._open_until_s, self._cool_down_s, self._is_probing = None, COOL_DOWN_S, False

    def on_failure(self, now_s: float) -> None:
        """An attempt here failed."""
        self._failed_s.append(now_s)
        if self._is_probing:
            self._cool_down_s = min(2 * self._cool_down_s, MAX_COOL_DOWN_S)
        elif len(self._failed_s) < MAX_FAILURES or self._failed_s[0] < now_s - WINDOW_S:
            return
        self.num_openings += self.state(now_s) != "open"
        self._open_until_s, self._is_probing = now_s + self._cool_down_s, False

    def on_withdrawn(self) -> None:
        """The request in flight ended without telling anything (aborted, preempted): the next one decides."""
        self._is_probing = False
