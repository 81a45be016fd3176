"""The nouns every layer shares: ids, the KV layout, tickets, requests, latency events.

Knows nothing of tensors, sockets or text. Everything here travels on the control plane, so everything
here is a `msgspec` struct.
"""

import hashlib
from typing import Literal, NewType, get_args

import msgspec

from kvrelay.sampling_params import SamplingParams

RequestId = NewType("RequestId", str)
WorkerId = NewType("WorkerId", str)
TicketId = NewType("TicketId", str)
Phase = Literal["prefill", "transfer", "decode"]
PHASES: tuple[Phase, ...] = get_args(Phase)
Role = Literal["prefill", "decode", "colocated"]
LifeEvent = Literal["prefill_started", "prefill_finished", "kv_usable", "kv_committed", "decode_started"]
FinishReason = Literal["stop", "length", "abort"]

BLOCK_SIZE = 64
LAYOUT_VERSION = 1


def num_blocks(num_tokens: int) -> int:
    """Pages that `num_tokens` tokens occupy: the ceiling of the quotient."""
    return -(-num_tokens // BLOCK_SIZE)


class KVLayout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What two workers must agree on before KV may move between them.

    One page of one layer holds K then V of `block_size` tokens, each `[num_kv_heads, block_size, head_dim]`.
    `model` identifies the model (a digest of its configuration and weights).
    `dense_below_tokens` and `decode_dense_below_tokens` are the numbers that `"auto"` stands for in settings
    of sparse attention, on which KV depends; None where there are none.
    """

    model: str
    dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int = BLOCK_SIZE
    version: int = LAYOUT_VERSION
    dense_below_tokens: int | None = None
    decode_dense_below_tokens: int | None = None

    @property
    def statistics(self) -> int:
        """The number of the part of a block that is its statistics; those below it are tiles of K and V."""
        return 2 * self.num_kv_heads

    @property
    def num_parts(self) -> int:
        """Parts of a block in one layer: K and V of each head, and its statistics."""
        return 2 * self.num_kv_heads + 1

    @property
    def page_bytes(self) -> int:
        """Bytes of K (or of V) of one block in one layer."""
        size = {"float32": 4, "bfloat16": 2, "float16": 2}[self.dtype]
        return self.num_kv_heads * self.block_size * self.head_dim * size

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers, K and V."""
        return self.num_layers * 2 * self.page_bytes

    def fingerprint(self) -> str:
        """16 hex digits that are equal exactly when the layouts are."""
        return hashlib.blake2b(msgspec.json.encode(self), digest_size=8).hexdigest()

    def difference(self, other: "KVLayout") -> str:
        """The fields that differ, `name: mine != theirs`, for an error a person can act on."""
        fields = (f for f in self.__struct_fields__ if getattr(self, f) != getattr(other, f))
        return ", ".join(f"{f}: {getattr(self, f)!r} != {getattr(other, f)!r}" for f in fields)


class TransferTicket(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Permission to write one request's prompt KV into blocks that decode has reserved.

    `num_tokens` are to be there in the end. Decode has the first `num_cached_tokens` of them, in whole blocks
    that nobody may write to; `block_ids` are the blocks of the others, in order.

    Minted once by the decode worker; afterwards committed, aborted or expired, exactly once. `epoch` is the
    decode worker's: a ticket of an earlier epoch opens nothing. The lease is the longest silence allowed
    between two signs of life from the writer.
    """

    ticket_id: TicketId
    request_id: RequestId
    attempt: int
    decode_worker: WorkerId
    epoch: int
    block_ids: tuple[int, ...]
    num_tokens: int
    lease_s: float
    num_cached_tokens: int = 0


class HandOff(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a request's KV came to decode: bytes (before the first token, and in all), and stalls.

    A stall is a decode step that lacked some of it and was repeated once that had come: `stall_s` in all.
    """

    bytes_before_first_token: int = 0
    num_bytes: int = 0
    num_stalls: int = 0
    stall_s: float = 0.0

    def __add__(self, other: "HandOff") -> "HandOff":
        return HandOff(
            self.bytes_before_first_token + other.bytes_before_first_token,
            self.num_bytes + other.num_bytes,
            self.num_stalls + other.num_stalls,
            self.stall_s + other.stall_s,
        )


NO_HAND_OFF = HandOff()


class RequestSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One attempt at one request as workers see it.

    `token_ids` is the prompt and, after a retry, the tokens already delivered; the first
    `num_prompt_tokens` of them are the user's. All but the last are prefilled; the last is decode's first
    input. `max_total_tokens` bounds prompt and output together. `arrival` numbers requests by age, retries
    included: the lower, the older. `prompt_logprobs` is set while the prompt's log-probabilities are still
    owed: then prefill computes every position, whatever is cached.
    """

    request_id: RequestId
    attempt: int
    arrival: int
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    max_total_tokens: int
    params: SamplingParams
    seed: int
    prompt_logprobs: int | None = None

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens whose KV the prefill phase computes."""
        return len(self.token_ids) - 1

    @property
    def rank(self) -> tuple[int, int]:
        """Requests of lower rank are served first: by priority, then by age."""
        return self.params.priority, self.arrival


class TokenLogprobs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Natural-log probabilities at one output position: the chosen token's, and the most likely tokens'."""

    token_id: int
    logprob: float
    top: dict[int, float] = {}
