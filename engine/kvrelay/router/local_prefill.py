"""How long a prompt may be and still be worth computing on its decode worker: measured once, at the start.

A hand-off costs the request its transfer and the messages around it; a local prefill costs the requests that
decode there a pause as long as the prefill. Prompts whose pause is no longer than the hand-off stay local.
"""

from collections.abc import Callable
from statistics import median

from kvrelay.types import WorkerId

NUM_PROBES = 5  # of each kind; the first two only warm up
NUM_WARM_UP = 2

TimeToFirstToken = Callable[[tuple[WorkerId, WorkerId]], float]


def hand_off_seconds(ttft_s: TimeToFirstToken, prefill: WorkerId, decode: WorkerId) -> float:
    """What a hand-off adds to the time to first token of one short prompt on an idle pool, at least 0.

    `ttft_s((prefill, decode))` runs one request. Both ways are tried in turn; medians are compared.
    """
    remote, local = [], []
    for _ in range(NUM_PROBES):
        remote.append(ttft_s((prefill, decode)))
        local.append(ttft_s((decode, decode)))
    return max(0.0, median(remote[NUM_WARM_UP:]) - median(local[NUM_WARM_UP:]))


def worthwhile_tokens(hand_off_s: float, prefill_s_per_token: float | None) -> int:
    """Prompt tokens whose prefill on decode takes as long as a hand-off; 0 while the speed is unknown."""
    return int(hand_off_s / prefill_s_per_token) if prefill_s_per_token else 0
