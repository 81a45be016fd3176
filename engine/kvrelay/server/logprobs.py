"""Log-probabilities as OpenAI's documents show them: tokens spelled out, with their places in the text."""

import codecs
from collections.abc import Sequence

from kvrelay.models.tokenizer import Tokenizer
from kvrelay.server.responses import Alternative, ChatLogprob, ChatLogprobs, CompletionLogprobs
from kvrelay.types import TokenLogprobs


class CompletionSpelling:
    """Spells the tokens of one choice of a completion, chunk after chunk."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def spell(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> CompletionLogprobs:
        """The tokens' log-probabilities; None where there is none: the first of a prompt.

        A token's own log-probability is among the most likely ones even where it is not one of them.
        """
        offsets = [self._advance(token_id) for token_id in token_ids]
        return CompletionLogprobs(
            tokens=[spelled(self._tokenizer, token_id) for token_id in token_ids],
            token_logprobs=[None if entry is None else entry.logprob for entry in logprobs],
            top_logprobs=[None if entry is None else self._top(entry) for entry in logprobs],
            text_offset=offsets,
        )

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        top = {spelled(self._tokenizer, token_id): value for token_id, value in entry.top.items()}
        return top | {spelled(self._tokenizer, entry.token_id): entry.logprob}

    def _advance(self, token_id: int) -> int:
        offset = self._offset
        if not self._tokenizer.is_special(token_id):
            self._offset += len(self._characters.decode(self._tokenizer.token_bytes(token_id)))
        return offset


def spell_chat(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprobs]) -> ChatLogprobs:
    """A message's log-probabilities."""
    content = []
    for entry in logprobs:
        own = _alternative(tokenizer, entry.token_id, entry.logprob)
        top = [_alternative(tokenizer, token_id, value) for token_id, value in entry.top.items()]
        content.append(ChatLogprob(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=top))
    return ChatLogprobs(content=content)


def spelled(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as text, or `bytes:\\xNN…` (OpenAI's way) when its bytes are not whole characters."""
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _alternative(tokenizer: Tokenizer, token_id: int, logprob: float) -> Alternative:
    raw = tokenizer.token_bytes(token_id)
    return Alternative(token=spelled(tokenizer, token_id), logprob=logprob, bytes=list(raw))
