"""The nouns every layer shares: ids, sampling parameters, the KV layout, tickets, latency events.

Knows nothing of tensors, sockets or text. Everything here travels on the control plane, so everything
here is a `msgspec` struct.
"""

import hashlib
from collections.abc import Sequence
from typing import Literal, NewType

import msgspec

from kvrelay.errors import InvalidConfig, InvalidRequest
from kvrelay.sparse import SparseAttention, sparse_settings

RequestId = NewType("RequestId", str)
WorkerId = NewType("WorkerId", str)
TicketId = NewType("TicketId", str)
Phase = Literal["prefill", "transfer", "decode"]
Role = Literal["prefill", "decode", "colocated"]
LifeEvent = Literal["prefill_started", "prefill_finished", "kv_usable", "kv_committed", "decode_started"]
FinishReason = Literal["stop", "length", "abort"]

BLOCK_SIZE = 64
LAYOUT_VERSION = 1
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024
MAX_SALT_CHARACTERS = 256
MAX_LOGIT_BIASES = 1024
MAX_INTEGER = 2**31 - 1


def num_blocks(num_tokens: int, block_size: int = BLOCK_SIZE) -> int:
    """Pages that `num_tokens` tokens occupy: the ceiling of the quotient."""
    return -(-num_tokens // block_size)


_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How tokens are chosen and when a request ends; names and defaults are vLLM's.

    `temperature=0` is greedy. `top_k=0` (or -1) and `top_p=1` switch those filters off. With a `seed`, the
    token drawn depends on (seed, position, distribution) only, whichever way the request was served;
    without one, the engine draws a seed. `logprobs=k` returns the chosen token's and the k most likely
    tokens' log-probabilities, after penalties and before temperature; `prompt_logprobs=k` those of the
    prompt's tokens, each given what stands before it. `logit_bias` adds -100 to 100 to single tokens' logits.
    Requests of a lower `priority` are served first, those of equal priority in order of arrival. KV is
    reused only between requests of equal `cache_salt` (a tenant's secret, say); None shares with all that
    have none. `attention` replaces the engine's for this request, where the engine was not started dense.

    Raises `InvalidRequest`, naming the field, when a value is out of range.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] = {}
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    priority: int = 0
    cache_salt: str | None = None
    attention: str | SparseAttention | None = None

    def __post_init__(self) -> None:
        _check_kinds(self)
        _check_attention(self.attention)
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        msgspec.structs.force_setattr(self, "stop", stop)
        msgspec.structs.force_setattr(self, "stop_token_ids", tuple(self.stop_token_ids))
        for field in _FLOATS:
            msgspec.structs.force_setattr(self, field, _as_float(field, getattr(self, field)))
        biases = {token: _as_float("logit_bias", value) for token, value in self.logit_bias.items()}
        msgspec.structs.force_setattr(self, "logit_bias", biases)
        for field, (ok, expected) in self._rules().items():
            if not ok:
                raise InvalidRequest(f"{field}={getattr(self, field)!r}: expected {expected}")

    def _rules(self) -> dict[str, tuple[bool, str]]:
        stops_ok = len(self.stop) <= MAX_STOP_STRINGS and all(
            _is_text(stop, MAX_STOP_CHARACTERS) for stop in self.stop
        )
        return {
            "max_tokens": (1 <= self.max_tokens <= MAX_INTEGER, f"1 to {MAX_INTEGER}"),
            "min_tokens": (0 <= self.min_tokens <= self.max_tokens, f"0 to max_tokens={self.max_tokens}"),
            "temperature": (0.0 <= self.temperature < float("inf"), "a finite number >= 0"),
            "top_p": (0.0 < self.top_p <= 1.0, "above 0, at most 1"),
            "top_k": (-1 <= self.top_k <= MAX_INTEGER, f"-1 to {MAX_INTEGER}"),
            "min_p": (0.0 <= self.min_p <= 1.0, "0 to 1"),
            "seed": (self.seed is None or 0 <= self.seed < 2**63, "None or 0 to 2**63-1"),
            "stop": (
                stops_ok,
                f"at most {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_CHARACTERS} characters",
            ),
            "stop_token_ids": (
                all(_is_integer(token) and 0 <= token <= MAX_INTEGER for token in self.stop_token_ids),
                "token ids >= 0",
            ),
            "logprobs": (_is_few(self.logprobs), f"0 to {MAX_LOGPROBS}"),
            "prompt_logprobs": (_is_few(self.prompt_logprobs), f"0 to {MAX_LOGPROBS}"),
            "logit_bias": (
                _are_biases(self.logit_bias),
                f"at most {MAX_LOGIT_BIASES} token ids, each with a number from -100 to 100",
            ),
            "repetition_penalty": (0.01 <= self.repetition_penalty <= 100.0, "0.01 to 100"),
            "presence_penalty": (-2.0 <= self.presence_penalty <= 2.0, "-2 to 2"),
            "frequency_penalty": (-2.0 <= self.frequency_penalty <= 2.0, "-2 to 2"),
            "priority": (abs(self.priority) <= MAX_INTEGER, f"-{MAX_INTEGER} to {MAX_INTEGER}"),
            "cache_salt": (
                self.cache_salt is None or _is_text(self.cache_salt, MAX_SALT_CHARACTERS),
                f"None or 1 to {MAX_SALT_CHARACTERS} characters",
            ),
        }


def _check_attention(attention: object) -> None:
    if attention is None:
        return
    if not isinstance(attention, str | SparseAttention):
        raise InvalidRequest(f"attention={attention!r}: expected a name or SparseAttention(...)")
    try:
        sparse_settings(attention)
    except InvalidConfig as error:
        raise InvalidRequest(str(error)) from None


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: object, max_characters: int) -> bool:
    """A string of allowed length that UTF-8 can carry: no lone surrogates."""
    if not isinstance(value, str) or not 1 <= len(value) <= max_characters:
        return False
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _is_few(count: int | None) -> bool:
    return count is None or 0 <= count <= MAX_LOGPROBS


def _are_biases(biases: dict[int, float]) -> bool:
    return len(biases) <= MAX_LOGIT_BIASES and all(
        _is_integer(token) and 0 <= token <= MAX_INTEGER and -100.0 <= bias <= 100.0
        for token, bias in biases.items()
    )


def _as_float(field: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(f"{field}={value!r}: expected a number")
    try:
        return float(value)
    except OverflowError:
        assert isinstance(value, int)
        raise InvalidRequest(
            f"{field}=an integer of {value.bit_length()} bits: too large for a float"
        ) from None


def _check_kinds(params: SamplingParams) -> None:
    optional = {"seed", "logprobs", "prompt_logprobs"}
    for field in ("max_tokens", "min_tokens", "top_k", "priority", *sorted(optional)):
        value = getattr(params, field)
        if not _is_integer(value) and not (value is None and field in optional):
            raise InvalidRequest(f"{field}={value!r}: expected an integer")
    if not isinstance(params.ignore_eos, bool):
        raise InvalidRequest(f"ignore_eos={params.ignore_eos!r}: expected true or false")
    if not isinstance(params.logit_bias, dict):
        raise InvalidRequest(f"logit_bias={params.logit_bias!r}: expected numbers by token id")
    for field in ("stop", "stop_token_ids"):
        value = getattr(params, field)
        if not isinstance(value, str | list | tuple) or (
            field == "stop_token_ids" and isinstance(value, str)
        ):
            raise InvalidRequest(f"{field}={value!r}: expected a list")


class KVLayout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What two workers must agree on before KV may move between them.

    One page of one layer holds K then V of `block_size` tokens, each `[num_kv_heads, block_size, head_dim]`.
    `model` identifies the weights (a digest of the configuration and of the weight files' headers).
    `dense_below_tokens` is the number that `"auto"` stands for in settings of sparse attention, on which KV
    depends; None where there are none.
    """

    model: str
    dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int = BLOCK_SIZE
    version: int = LAYOUT_VERSION
    dense_below_tokens: int | None = None

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
