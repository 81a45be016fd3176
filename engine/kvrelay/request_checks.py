"""What makes a request or a setting wrong for the model at hand."""

from collections.abc import Sequence

from kvrelay.errors import InvalidConfig, InvalidRequest
from kvrelay.models.spec import ModelSpec
from kvrelay.sampling_params import SamplingParams
from kvrelay.sparse import SparseAttention


def check_layers(sparse: SparseAttention | None, spec: ModelSpec) -> None:
    """Raise `InvalidConfig` for a dense layer that the model does not have."""
    too_high = [] if sparse is None else [n for n in sparse.dense_layers if n >= spec.num_layers]
    if too_high:
        raise InvalidConfig(f"dense_layers={too_high[0]}: the model has layers 0 to {spec.num_layers - 1}")


def check_kinds(prompt: object, params: object) -> None:
    """Raise `InvalidRequest` for a prompt that is neither text nor token ids, or for other parameters."""
    if isinstance(prompt, bytes | bytearray) or not isinstance(prompt, Sequence):
        raise InvalidRequest(f"prompt: expected text or token ids; got {type(prompt).__name__}")
    if not isinstance(params, SamplingParams):
        raise InvalidRequest(f"params: expected SamplingParams; got {type(params).__name__}")


def check_tokens(token_ids: Sequence[int], vocab_size: int, field: str = "prompt") -> None:
    """Raise `InvalidRequest`, naming the field, for no tokens or one that the vocabulary does not have."""
    if not token_ids:
        raise InvalidRequest(f"{field}: it is empty; at least one token is needed")
    if set(map(type, token_ids)) == {int} and min(token_ids) >= 0 and max(token_ids) < vocab_size:
        return
    for token in token_ids:  # one of them is wrong: which?
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise InvalidRequest(f"{field}: token id {token!r} is not in 0 to {vocab_size - 1}")
