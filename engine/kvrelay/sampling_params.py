"""What a request may say about how its tokens are chosen, checked when it is made."""

from collections.abc import Sequence

import msgspec

from kvrelay.errors import InvalidConfig, InvalidRequest
from kvrelay.sparse import SparseAttention, sparse_settings

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024
MAX_SALT_CHARACTERS = 256
MAX_LOGIT_BIASES = 1024
MAX_INTEGER = 2**31 - 1

_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How tokens are chosen and when a request ends; names and defaults are vLLM's.

    `temperature=0` is greedy. `top_k=0` (or -1) and `top_p=1` switch those filters off. With a `seed`, the
    token drawn depends on (seed, position, distribution) only, whichever way the request was served;
    without one (None, or -1), the engine draws a seed. `logprobs=k` returns the chosen token's and the k most
    likely tokens' log-probabilities, after penalties and before temperature; `prompt_logprobs=k` those of
    the prompt's tokens, each given what stands before it. `logit_bias` adds -100 to 100 to single logits.
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
        if self.seed == -1:
            msgspec.structs.force_setattr(self, "seed", None)
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
            "seed": (self.seed is None or -(2**63) <= self.seed < 2**63, "None or -2**63 to 2**63-1"),
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
