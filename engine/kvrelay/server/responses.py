"""The documents clients get, as OpenAI defines them, with `kvrelay` beside when it was asked for."""

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from kvrelay.energy import RequestEnergy
from kvrelay.metrics import Timings, WorkerReport
from kvrelay.outputs import RequestOutput
from kvrelay.sparse import AttentionUse, SparseAttention
from kvrelay.types import FinishReason, HandOff, Role


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong; `param` names the field when one is to blame."""

    message: str
    type: str
    param: str | None
    code: str | int | None


class ErrorResponse(msgspec.Struct, frozen=True, kw_only=True):
    """Every response with a status from 400 on."""

    error: ErrorBody


class PromptTokensDetails(msgspec.Struct, frozen=True, kw_only=True):
    """How many of the prompts' tokens were found in a cache."""

    cached_tokens: int


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens read and generated, all choices of the request together; details once all have ended."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | UnsetType = UNSET


class AttentionRead(msgspec.Struct, frozen=True, kw_only=True):
    """`AttentionUse` with what follows from it: keys a query read on average, and the share of all pairs."""

    num_queries: int
    attended_pairs: int
    causal_pairs: int
    attended_tokens_per_query: float
    share_of_pairs: float

    @classmethod
    def of(cls, use: AttentionUse) -> "AttentionRead":
        """What is told of it."""
        return cls(
            **msgspec.structs.asdict(use),
            attended_tokens_per_query=use.attended_tokens_per_query,
            share_of_pairs=use.share_of_pairs,
        )


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One request's ledger (seconds), joules (None where nobody measured), what its attention read by phase
    (nothing where the engine is dense), by which settings (None: dense), and how its KV came to decode."""

    timings: Timings
    energy: RequestEnergy
    attention: dict[str, AttentionRead]
    sparse: SparseAttention | None
    hand_off: HandOff

    @classmethod
    def of(cls, output: RequestOutput) -> "Measured":
        """From a finished request."""
        return cls(
            timings=output.timings,
            energy=output.energy,
            attention={phase: AttentionRead.of(use) for phase, use in output.attention.items()},
            sparse=output.sparse,
            hand_off=output.hand_off,
        )


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """What every document of one response repeats, and what it may carry beside its choices."""

    id: str
    created: int
    model: str
    usage: Usage | UnsetType | None = UNSET
    kvrelay: Measured | list[Measured] | UnsetType = UNSET


class CompletionLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Per token: its spelling, log-probability, most likely alternatives, and place in the text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One continuation, or a piece of one."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None


class Completion(Reply, frozen=True, kw_only=True):
    """A completion, or one chunk of its stream."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class Alternative(msgspec.Struct, frozen=True, kw_only=True):
    """A token that could have stood here."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """One generated token, and what else was likely."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[Alternative]


class ChatLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Log-probabilities of a message's tokens."""

    content: list[ChatLogprob]


class AssistantMessage(msgspec.Struct, frozen=True, kw_only=True):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason


class ChatCompletion(Reply, frozen=True, kw_only=True):
    """An answer to a conversation."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """What a chunk adds to the message."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(Reply, frozen=True, kw_only=True):
    """One chunk of a streamed answer."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["kvrelay"] = "kvrelay"
    root: str
    max_model_len: int


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """The models that are served: one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Tokenized(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt's tokens."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(msgspec.Struct, frozen=True, kw_only=True):
    """The text of tokens."""

    prompt: str


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the process answers, or whether it would serve a request; `reason` says why not."""

    status: Literal["ok", "not ready"]
    reason: str | None = None


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """Our version."""

    version: str


class RoleChanged(msgspec.Struct, frozen=True, kw_only=True):
    """A worker does something else now; `epoch` counts its roles."""

    worker_id: str
    role: Role
    epoch: int


class WorkerList(msgspec.Struct, frozen=True, kw_only=True):
    """The workers, as in the report."""

    workers: list[WorkerReport]
