"""Outputs and events to documents: one writer for completions, one for chat.

Knows documents and text. Knows nothing of connections.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from kvrelay.models.tokenizer import Tokenizer
from kvrelay.outputs import RequestOutput, StreamEvent
from kvrelay.server.logprobs import CompletionSpelling, spell_chat
from kvrelay.server.plan import Plan
from kvrelay.server.responses import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Delta,
    Measured,
    PromptTokensDetails,
    Reply,
    Usage,
)
from kvrelay.types import FinishReason

MaybeUsage = Usage | UnsetType | None
Document = TypeVar("Document", bound=Reply)


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What every document of one response repeats."""

    id: str
    created: int
    model: str

    @classmethod
    def new(cls, name: str, model: str) -> "Head":
        """An identity of that name, from now."""
        return cls(id=name, created=int(time.time()), model=model)

    def on(self, kind: type[Document], **rest: Any) -> Document:
        """A document of that kind with this head."""
        return kind(id=self.id, created=self.created, model=self.model, **rest)


class Writer(Protocol):
    """Writes one response, whole or in chunks."""

    def whole(self, outputs: Sequence[RequestOutput]) -> msgspec.Struct:
        """The response that is not streamed."""

    def chunks(self, index: int, event: StreamEvent, usage: MaybeUsage) -> list[msgspec.Struct]:
        """What one choice's news becomes; `event` may hold several tokens."""

    def usage_chunk(self, usage: Usage) -> msgspec.Struct:
        """The last chunk of a stream that was asked for its usage."""


def measured(plan: Plan, outputs: Sequence[RequestOutput | None]) -> Measured | list[Measured] | UnsetType:
    """What was measured, if it was asked for: of the only output, or a list of each one's."""
    ended = [output for output in outputs if output is not None]
    if not plan.with_measured or not ended:
        return UNSET
    each = [Measured.of(output) for output in ended]
    return each[0] if len(each) == 1 else each


def total_usage(plan: Plan, num_output_tokens: int, num_cached: int | None) -> Usage:
    """Tokens read and shown; the one that `max_tokens: 0` computes is not. `num_cached=None`: unknown yet."""
    shown = 0 if plan.is_prompt_only else num_output_tokens
    prompt = plan.num_prompt_tokens
    details: PromptTokensDetails | UnsetType = UNSET
    if num_cached is not None:
        details = PromptTokensDetails(cached_tokens=num_cached)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=shown,
        total_tokens=prompt + shown,
        prompt_tokens_details=details,
    )


def _num_cached(plan: Plan, outputs: Sequence[RequestOutput]) -> int:
    """Cached tokens of all prompts, each counted once: those of its first choice."""
    return sum(output.num_cached_tokens for output in outputs[:: plan.n])


class CompletionWriter:
    """`text_completion` documents, with the prompt before the text when it is echoed."""

    def __init__(self, plan: Plan, head: Head, tokenizer: Tokenizer, echo: bool) -> None:
        self._plan, self._head, self._tokenizer, self._echo = plan, head, tokenizer, echo
        self._with_logprobs = plan.prepared[0].params.logprobs is not None
        self._spellings = [CompletionSpelling(tokenizer) for _ in plan.prepared]
        self._begun: set[int] = set()

    def whole(self, outputs: Sequence[RequestOutput]) -> Completion:
        choices = []
        for index, output in enumerate(outputs):
            event = StreamEvent(
                request_id=output.request_id,
                text=output.text,
                token_ids=output.token_ids,
                logprobs=output.logprobs or [],
                prompt_logprobs=output.prompt_logprobs,
                output=output,
            )
            choices.append(self._choice(index, event))
        tokens = sum(len(output.token_ids) for output in outputs)
        usage = total_usage(self._plan, tokens, _num_cached(self._plan, outputs))
        return self._head.on(Completion, choices=choices, usage=usage, kvrelay=measured(self._plan, outputs))

    def chunks(self, index: int, event: StreamEvent, usage: MaybeUsage) -> list[msgspec.Struct]:
        choices, cost = [self._choice(index, event)], measured(self._plan, [event.output])
        return [self._head.on(Completion, choices=choices, usage=usage, kvrelay=cost)]

    def usage_chunk(self, usage: Usage) -> Completion:
        return self._head.on(Completion, choices=[], usage=usage)

    def _choice(self, index: int, event: StreamEvent) -> CompletionChoice:
        is_first, is_hidden = index not in self._begun, self._plan.is_prompt_only
        self._begun.add(index)
        echoed = self._prompt_text(index) if self._echo and is_first else ""
        reason: FinishReason | None = event.output.finish_reason if event.output else None
        if is_hidden and reason is not None:
            reason = "length"
        return CompletionChoice(
            index=index,
            text=echoed + ("" if is_hidden else event.text),
            logprobs=self._logprobs(index, event, self._echo and is_first),
            finish_reason=reason,
        )

    def _logprobs(self, index: int, event: StreamEvent, with_prompt: bool) -> CompletionLogprobs | None:
        if not self._with_logprobs:
            return None
        token_ids, logprobs = list(event.token_ids), list(event.logprobs)
        if self._plan.is_prompt_only:
            token_ids, logprobs = [], []
        if with_prompt:
            prompt = self._plan.prepared[index].token_ids
            return self._spellings[index].spell(
                [*prompt, *token_ids], [*(event.prompt_logprobs or []), *logprobs]
            )
        return self._spellings[index].spell(token_ids, logprobs)

    def _prompt_text(self, index: int) -> str:
        prompt = self._plan.prompts[index // self._plan.n]
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)


class ChatWriter:
    """`chat.completion` documents; a stream's first chunk names the role."""

    def __init__(self, plan: Plan, head: Head, tokenizer: Tokenizer) -> None:
        self._plan, self._head, self._tokenizer = plan, head, tokenizer
        self._begun: set[int] = set()

    def whole(self, outputs: Sequence[RequestOutput]) -> ChatCompletion:
        choices = [
            ChatChoice(
                index=index,
                message=AssistantMessage(content=output.text),
                logprobs=None if output.logprobs is None else spell_chat(self._tokenizer, output.logprobs),
                finish_reason=output.finish_reason,
            )
            for index, output in enumerate(outputs)
        ]
        tokens = sum(len(output.token_ids) for output in outputs)
        usage = total_usage(self._plan, tokens, _num_cached(self._plan, outputs))
        return self._head.on(
            ChatCompletion, choices=choices, usage=usage, kvrelay=measured(self._plan, outputs)
        )

    def chunks(self, index: int, event: StreamEvent, usage: MaybeUsage) -> list[msgspec.Struct]:
        found: list[msgspec.Struct] = []
        if index not in self._begun:
            self._begun.add(index)
            opening = ChatChunkChoice(index=index, delta=Delta(role="assistant", content=""))
            found.append(self._head.on(ChatChunk, choices=[opening], usage=usage))
        choice = ChatChunkChoice(
            index=index,
            delta=Delta(content=event.text),
            logprobs=spell_chat(self._tokenizer, event.logprobs) if event.logprobs else None,
            finish_reason=event.output.finish_reason if event.output else None,
        )
        cost = measured(self._plan, [event.output])
        found.append(self._head.on(ChatChunk, choices=[choice], usage=usage, kvrelay=cost))
        return found

    def usage_chunk(self, usage: Usage) -> ChatChunk:
        return self._head.on(ChatChunk, choices=[], usage=usage)
