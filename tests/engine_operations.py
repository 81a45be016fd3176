"""The engine's own work around a model step, each operation on its own, for `benchmarks/engine.py` and tests.

No model: what is timed here is what the engine costs between two forwards.
"""

from collections.abc import Callable

import numpy as np
import torch

from kvrelay.cache.pool import BlockPool
from kvrelay.codec import decode, encode
from kvrelay.router.core import Router
from kvrelay.router.policies import open_policy
from kvrelay.router.request import RoutedRequest
from kvrelay.sampler import Row, sample
from kvrelay.sampling_params import SamplingParams
from kvrelay.scheduler.decode import DecodeScheduler, DecodeSequence
from kvrelay.types import RequestId, RequestSpec, Role, WorkerId, num_blocks
from kvrelay.wire import NewToken, StepReport
from tiny_engine import hello

PROMPT_TOKENS = 256
VOCABULARY = 49_152
PARAMS = SamplingParams(max_tokens=2**30, temperature=0.0)
Operation = Callable[[], object]


def operations() -> dict[str, Operation]:
    """Every operation by name; each can be called again and again."""
    return {
        "scheduler step, 16 sequences": scheduler_step(16),
        "scheduler step, 1000 sequences": scheduler_step(1000),
        "sampling, 16 rows, temperature 1": sampling(16),
        "pool, 16 blocks out and back": pool_cycle(16),
        "codec, report of 16 tokens": codec_cycle(16),
        "router, report of 16 tokens": router_step(16),
        "router, request in and out over 4 + 4 workers": router_decision(4),
    }


def scheduler_step(num_sequences: int) -> Operation:
    """Plan a batch of all sequences, and ask of each whether it ends."""
    pool = BlockPool(2 * num_sequences * num_blocks(PROMPT_TOKENS))
    scheduler = DecodeScheduler(pool, max_num_seqs=num_sequences)
    for index in range(num_sequences):
        spec = RequestSpec(
            request_id=RequestId(f"r{index}"),
            attempt=1,
            arrival=index,
            token_ids=tuple(range(PROMPT_TOKENS)),
            num_prompt_tokens=PROMPT_TOKENS,
            max_total_tokens=2**30,
            params=PARAMS,
            seed=0,
        )
        blocks = pool.allocate(num_blocks(PROMPT_TOKENS))
        scheduler.run(DecodeSequence(spec, blocks, list(spec.token_ids)))
    eos = frozenset({2})

    def step() -> int:
        batch, preempted = scheduler.plan()
        assert (len(batch), preempted) == (num_sequences, [])
        return sum(scheduler.finish_reason(sequence, eos) is None for sequence in batch)

    return step


def sampling(num_rows: int) -> Operation:
    """Draw a token for each row, default parameters; logits as SmolLM2-135M's lie on prose, in random order.

    Of its vocabulary 7 tokens are within 2 of the largest, 85 within 5, 2,345 within 10 (means of 64 places).
    """
    ranks, below = [1, 7, 16, 85, 383, 2345, 17_790, 42_107, VOCABULARY], [0, 2, 3, 5, 7, 10, 15, 20, 25]
    values = np.interp(np.log(np.arange(1, VOCABULARY + 1)), np.log(ranks), below).astype(np.float32)
    shuffle = np.random.default_rng(1).permutation
    logits = torch.from_numpy(np.stack([shuffle(-values) for _ in range(num_rows)]))
    rows = [Row(SamplingParams(), index, [0] * PROMPT_TOKENS, PROMPT_TOKENS, ()) for index in range(num_rows)]
    return lambda: sample(logits, rows)


def pool_cycle(count: int) -> Operation:
    """Take blocks, share them, give them back."""
    pool = BlockPool(1024)

    def cycle() -> None:
        blocks = pool.allocate(count)
        pool.retain(blocks)
        pool.release(blocks)
        pool.release(blocks)

    return cycle


def report(num_tokens: int) -> StepReport:
    """One decode step's report, a token for each of `num_tokens` requests."""
    ids = [RequestId(f"r{index}") for index in range(num_tokens)]
    return StepReport(
        worker_id=WorkerId("decode-0"),
        phase="decode",
        start_s=1.0,
        end_s=1.01,
        cpu_s=0.01,
        num_tokens=dict.fromkeys(ids, 1),
        tokens=tuple(NewToken(request_id=name, attempt=1, token_id=7) for name in ids),
    )


def codec_cycle(num_tokens: int) -> Operation:
    """A report to bytes and back."""
    message = report(num_tokens)
    return lambda: decode(encode(message), "worker_to_router")


def router_step(num_tokens: int) -> Operation:
    """A report handed to the router, which delivers each token."""
    router = _router(1)
    for index in range(num_tokens):
        router.submit(routed(index), 0.0)
    assert len(router.requests) == num_tokens
    message = report(num_tokens)
    return lambda: router.on_message(message, 2.0)


def router_decision(num_workers: int) -> Operation:
    """Choose a pair for a request, tell its decode worker, and forget the request."""
    router = _router(num_workers)

    def decide() -> None:
        waiting = routed(0)  # a new one: its ledger grows with what happens to it
        router.submit(waiting, 0.0)
        assert waiting.decode is not None
        router.finish(waiting.request_id, "abort", 0.0)

    return decide


def routed(index: int) -> RoutedRequest:
    """A request as the router gets it."""
    return RoutedRequest(
        request_id=RequestId(f"r{index}"),
        arrival=index,
        params=PARAMS,
        seed=0,
        token_ids=list(range(PROMPT_TOKENS)),
        num_prompt_tokens=PROMPT_TOKENS,
        max_total_tokens=PROMPT_TOKENS + 64,
    )


def _router(num_workers: int) -> Router:
    router = Router(open_policy("least_loaded"), lambda to, what: None, lambda update: None)
    roles: tuple[Role, ...] = ("prefill", "decode")
    for role in roles:
        for index in range(num_workers):
            router.fleet.add(hello(f"{role}-{index}", role, 1024))
    return router
