"""The documents clients send: one struct per endpoint, decoded and checked by msgspec in one pass.

Field names and meanings are OpenAI's, and vLLM's where OpenAI has none. Fields we do not know are ignored;
those that we know and cannot honour are refused by name (`REFUSED`): ignoring them would change the answer.
"""

import re
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from kvrelay.errors import InvalidRequest
from kvrelay.sampling_params import MAX_INTEGER, MAX_LOGIT_BIASES, MAX_LOGPROBS, MAX_SALT_CHARACTERS
from kvrelay.sparse import SparseAttention
from kvrelay.types import Role

MAX_CHOICES = 128  # `n`
MAX_MESSAGES = 4096

Count = Annotated[int, Meta(ge=0, le=MAX_INTEGER)]
Logprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
Body = TypeVar("Body")


class StreamOptions(msgspec.Struct, frozen=True):
    """What a stream tells beside its text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """What completions and chat have in common."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    min_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=MAX_INTEGER)] | None = None
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100.0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: Annotated[list[Count], Meta(max_length=256)] | None = None
    ignore_eos: bool | None = None
    logit_bias: Annotated[dict[int, float], Meta(max_length=MAX_LOGIT_BIASES)] | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    best_of: Annotated[int, Meta(ge=1, le=1)] | None = None
    user: str | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=MAX_INTEGER)] | None = None
    cache_salt: Annotated[str, Meta(max_length=MAX_SALT_CHARACTERS)] | None = None
    attention: str | SparseAttention | None = None
    kvrelay: bool | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    use_beam_search: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    truncate_prompt_tokens: int | None = None
    logits_processors: Any = None
    add_special_tokens: bool | None = None
    allowed_token_ids: list[Any] | None = None
    bad_words: list[Any] | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None


class CompletionRequest(Sampling, frozen=True, kw_only=True):
    """`POST /v1/completions`; `prompt` is text, token ids, or a list of either."""

    prompt: str | Annotated[list[str | int | list[int]], Meta(min_length=1)]
    suffix: str | None = None
    echo: bool | None = None
    logprobs: Logprobs | None = None
    prompt_embeds: Any = None


class ContentPart(msgspec.Struct, frozen=True):
    """One part of a message; only text is read."""

    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, frozen=True):
    """One message of a conversation."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[Any] | None = None


Messages = Annotated[list[ChatMessage], Meta(min_length=1, max_length=MAX_MESSAGES)]


class ChatRequest(Sampling, frozen=True, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: Messages
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    echo: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[Any] | None = None
    audio: Any = None
    modalities: list[str] | None = None


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /tokenize`: exactly one of `prompt` and `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None
    tools: list[Any] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None


def _is_given(field: str, kind: str) -> dict[str, Any]:
    return {"required": [field], "properties": {field: {"type": kind}}}


EITHER = {"oneOf": [_is_given("prompt", "string"), _is_given("messages", "array")]}
TokenizeDocument = Annotated[TokenizeRequest, Meta(extra_json_schema=EITHER)]  # what types alone do not say


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /detokenize`."""

    tokens: list[Count]
    model: str | None = None


class RoleRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /v1/kvrelay/workers/ID/role`."""

    role: Role


REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {  # field -> values that ask for nothing, why not others
    "response_format": (({"type": "text"},), "constrained output is not built; only {'type': 'text'} is"),
    **dict.fromkeys(
        ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
        (({},), "constrained output is not built"),
    ),
    "use_beam_search": ((False,), "there is no beam search"),
    "skip_special_tokens": ((True,), "special tokens are always left out of the text"),
    "include_stop_str_in_output": ((False,), "text always ends before the stop string"),
    "truncate_prompt_tokens": ((), "prompts are never truncated; send the tokens that you want read"),
    "logits_processors": (([],), "code from clients is not run"),
    "allowed_token_ids": ((), "not built; logit_bias forbids tokens"),
    "bad_words": (([],), "not built; logit_bias forbids tokens"),
    "prompt_logprobs": ((), "completions show them with echo and logprobs"),
    **dict.fromkeys(("return_token_ids", "return_tokens_as_token_ids"), ((False,), "/tokenize tells ids")),
    "suffix": (("",), "the model cannot fill in the middle"),
    "prompt_embeds": ((), "tensors from clients are not read"),
    **dict.fromkeys(("tools", "functions"), (([],), "tool calls are not built")),
    **dict.fromkeys(("tool_choice", "function_call"), (("none", "auto"), "tool calls are not built")),
    "chat_template": ((), "templates from clients are not run; the model's own is used"),
    "chat_template_kwargs": (({},), "the model's own chat template takes no arguments here"),
    "documents": (([],), "the chat template is given messages only"),
    "continue_final_message": ((False,), "every answer is a message of its own"),
    "audio": ((), "the model reads and writes text"),
    "modalities": ((["text"], []), "the model reads and writes text"),
}


_MISSING = re.compile(r"Object missing required field `(.*)`")


def parse(body: bytes, kind: type[Body]) -> Body:
    """The document in `body`. Raises `InvalidRequest`, `field: what was expected`, for any other input."""
    try:
        document = msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        what, _, place = str(error).partition(" - at `")  # `$.n`, or `key` in `$.logit_bias`
        field = place.rpartition("$.")[2].rstrip("`")
        if missing := _MISSING.match(what):
            field = f"{field}.{missing[1]}" if field else missing[1]
        raise InvalidRequest(f"{field}: {what}" if field else f"the body: {what}") from None
    for field in kind.__struct_fields__:  # type: ignore[attr-defined]
        if field in REFUSED:
            value, (harmless, why) = getattr(document, field), REFUSED[field]
            if value is not None and value not in harmless:
                raise InvalidRequest(f"{field}={_short(value)}: {why}")
    return document


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
