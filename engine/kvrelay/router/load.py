"""What the router knows of each worker when it chooses: what it owes, has cached, and how fast it has been.

Pure; speeds and watts are measured figures that the router is told, None until there are any.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvrelay.router.breaker import Breaker
from kvrelay.types import BLOCK_SIZE, Phase, Role, WorkerId

FORGET = 0.98  # weight that one decode step keeps after the next


@dataclass(slots=True)
class DecodeSpeed:
    """Seconds of a decode step as a line over its number of sequences, by least squares, old steps fading."""

    weight: float = 0.0
    sequences: float = 0.0
    seconds: float = 0.0
    squares: float = 0.0
    products: float = 0.0

    def add(self, num_sequences: int, step_s: float) -> None:
        """One step was measured."""
        self.weight = self.weight * FORGET + 1.0
        self.sequences = self.sequences * FORGET + num_sequences
        self.seconds = self.seconds * FORGET + step_s
        self.squares = self.squares * FORGET + num_sequences * num_sequences
        self.products = self.products * FORGET + num_sequences * step_s

    def step_s(self, num_sequences: int) -> float | None:
        """A step's expected seconds; None before the first. With one batch size seen, that size's mean."""
        if not self.weight:
            return None
        mean_n, mean_s = self.sequences / self.weight, self.seconds / self.weight
        spread = self.squares / self.weight - mean_n * mean_n
        if spread < 1e-6:
            return mean_s
        slope = max(0.0, (self.products / self.weight - mean_n * mean_s) / spread)
        return max(mean_s / max(mean_n, 1.0), mean_s + slope * (num_sequences - mean_n))


@dataclass(slots=True, eq=False)
class Load:
    """What the router has given one worker and not got back, and what it knows of the worker.

    `num_prefill_tokens` of `num_prompts` prompts wait for their KV; `num_requests` are to be decoded, in
    `num_used_blocks` blocks of `num_blocks`. `cached` holds the names (`cache.prefix.block_hashes`) of the
    blocks that the worker said it has cached. `watts` is by phase, above the worker's own idle draw where
    that is known. `role_epoch` counts role changes; while `is_draining` nothing new is sent.
    """

    worker_id: WorkerId
    num_prefill_tokens: int = 0
    num_requests: int = 0
    num_prompts: int = 0
    num_used_blocks: int = 0
    role: Role = "colocated"
    num_blocks: int = 0
    max_num_seqs: int = 64
    chunk_tokens: int = 512
    cached: set[bytes] = field(default_factory=set)
    prefill_tokens: float = 0.0
    prefill_s: float = 0.0
    decode_speed: DecodeSpeed = field(default_factory=DecodeSpeed)
    watts: dict[Phase, float] = field(default_factory=dict)
    breaker: Breaker = field(default_factory=Breaker)
    role_epoch: int = 1
    is_draining: bool = False

    def change_cached(self, added: Sequence[bytes], removed: Sequence[bytes]) -> None:
        """The worker's prefix cache changed."""
        self.cached.difference_update(removed)
        self.cached.update(added)

    def num_cached_tokens(self, hashes: Sequence[bytes]) -> int:
        """Tokens at the start of a prompt, named by its blocks, whose KV the worker has."""
        if not self.cached:
            return 0
        count = next((i for i, name in enumerate(hashes) if name not in self.cached), len(hashes))
        return count * BLOCK_SIZE

    def add_prefill(self, num_tokens: int, seconds: float) -> None:
        """A prefill step was measured."""
        self.prefill_tokens = self.prefill_tokens * FORGET + num_tokens
        self.prefill_s = self.prefill_s * FORGET + seconds

    def prefill_seconds(self, num_tokens: int) -> float | None:
        """Expected seconds to prefill so many tokens; None before the first step."""
        return num_tokens * self.prefill_s / self.prefill_tokens if self.prefill_tokens else None

    def can_prefill(self) -> bool:
        """Whether another prompt keeps the worker busy rather than only waits there: one is computed, one is
        ready, and short ones fill two steps' budget."""
        return self.num_prompts < 2 or self.num_prefill_tokens < 2 * self.chunk_tokens

    def can_decode(self, num_new_blocks: int) -> bool:
        """Whether the worker has a slot and blocks for one more; the first of all always fits.

        The rule is the decode scheduler's own: each request there keeps a block in reserve to grow into.
        """
        if self.num_requests == 0:
            return True
        needed = self.num_used_blocks + num_new_blocks + self.num_requests
        return self.num_requests < self.max_num_seqs and needed <= self.num_blocks


@dataclass(frozen=True, slots=True)
class Job:
    """What a policy is told of a request: tokens to prefill, tokens it may generate, and the SLO it is under.

    `num_others` requests are given to workers already. `block_hashes` names the full blocks of its tokens;
    empty where no worker caches prefixes.
    """

    num_tokens: int
    max_new_tokens: int = 1
    num_others: int = 0
    block_hashes: Sequence[bytes] = ()
    slo_ttft_s: float | None = None
    slo_itl_s: float | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """Who would compute a prompt and who would generate; one and the same worker when it stays local."""

    prefill: Load
    decode: Load

    @property
    def is_local(self) -> bool:
        """Whether no KV would have to move."""
        return self.prefill.worker_id == self.decode.worker_id

    def num_tokens_to_compute(self, job: Job) -> int:
        """Prompt tokens that the prefill worker has not cached."""
        return max(0, job.num_tokens - self.prefill.num_cached_tokens(job.block_hashes))

    def ttft_s(self, job: Job) -> float | None:
        """Predicted time to first token: the prompts before it, its own, and one decode step."""
        ahead = self.prefill.num_prefill_tokens + self.num_tokens_to_compute(job)
        prefill_s = self.prefill.prefill_seconds(ahead)
        step_s = self.decode.decode_speed.step_s(self.decode.num_requests + 1)
        return None if prefill_s is None or step_s is None else prefill_s + step_s

    def itl_s(self) -> float | None:
        """Predicted gap between tokens: a decode step with this request in it."""
        return self.decode.decode_speed.step_s(self.decode.num_requests + 1)

    def joules(self, job: Job) -> float | None:
        """Predicted joules: each phase's watts times its seconds, a decode step's shared by its sequences.

        Decode workers are compared as if each had all requests, as far as its slots go: by the batches they
        happen to have, whoever has more would seem thriftier and would keep getting more.
        """
        count = max(self.decode.num_requests, min(job.num_others, self.decode.max_num_seqs - 1)) + 1
        prefill_s = self.prefill.prefill_seconds(self.num_tokens_to_compute(job))
        step_s = self.decode.decode_speed.step_s(count)
        prefill_w, decode_w = self.prefill.watts.get("prefill"), self.decode.watts.get("decode")
        if prefill_s is None or step_s is None or prefill_w is None or decode_w is None:
            return None
        return prefill_w * prefill_s + decode_w * step_s / count * job.max_new_tokens

    def keeps_slo(self, job: Job) -> bool:
        """Whether both predictions are within the SLO; what is not predicted yet is not held against it."""
        return _within(self.ttft_s(job), job.slo_ttft_s) and _within(self.itl_s(), job.slo_itl_s)


def _within(predicted: float | None, limit: float | None) -> bool:
    return predicted is None or limit is None or predicted <= limit
