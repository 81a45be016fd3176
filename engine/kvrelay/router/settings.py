"""The router's limits and aims."""

from dataclasses import dataclass

from kvrelay.sparse import SparseAttention


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSettings:
    """The router's share of `EngineConfig`, whose names these are; None switches a limit off."""

    max_queued_requests: int | None = None
    queue_timeout_s: float | None = None
    slo_ttft_s: float | None = None
    slo_itl_s: float | None = None
    local_prefill_tokens: int = 0
    attention: str | SparseAttention = "dense"
