"""What the router counts over a whole run."""

from dataclasses import dataclass, field

from kvrelay.router.request import RoutedRequest, Update

ENDS = ("finished", "aborted", "failed", "preempted", "retried")


@dataclass(slots=True)
class RunCounts:
    """Requests by what became of them (`preempted` and `retried` count attempts), tokens, and the window."""

    num_ended: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ENDS, 0))
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    first_arrival_s: float | None = None
    last_delivery_s: float = 0.0
    transfer_s: float = 0.0  # these three are sums over the requests that ended
    transfer_wait_s: float = 0.0
    ttft_s: float = 0.0

    def arrived(self, request: RoutedRequest, now_s: float) -> None:
        """A request was taken."""
        self.num_prompt_tokens += request.num_prompt_tokens
        self.first_arrival_s = now_s if self.first_arrival_s is None else self.first_arrival_s

    def ended(self, request: RoutedRequest, update: Update) -> None:
        """A request ended."""
        timings = request.ledger.timings(update.at_s)
        self.transfer_s += timings.transfer_s
        self.transfer_wait_s += timings.transfer_wait_s
        self.ttft_s += timings.ttft_s or 0.0
        kind = "failed" if update.error else "aborted" if update.finish_reason == "abort" else "finished"
        self.num_ended[kind] += 1
        self.last_delivery_s = update.at_s

    def window_s(self, now_s: float, *, is_running: bool) -> float:
        """Seconds from the first arrival to the last delivery, or to `now_s` while requests run."""
        if self.first_arrival_s is None:
            return 0.0
        return (now_s if is_running else self.last_delivery_s) - self.first_arrival_s
