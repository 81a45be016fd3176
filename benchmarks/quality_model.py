"""Runs a model for the quality benchmark: one context, many questions, through the engine's own attention.

The context's KV is computed once and shared by its questions, as the engine's prefix reuse does: what comes
before a question is a whole number of selection groups, so each answer is that of its prompt run whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from kvrelay.attention import PagedAttention, Span
from kvrelay.cache.memory import memory_bytes
from kvrelay.cache.store import KVStore
from kvrelay.models.decoder import Decoder
from kvrelay.sparse import GROUP_TOKENS, AttentionUse, SparseAttention
from kvrelay.types import KVLayout, num_blocks

CHUNK_TOKENS = 2048


@dataclass
class Reader:
    """A model over a pool of `max_tokens` tokens; `use` says what was read since it was last cleared."""

    model: Decoder
    max_tokens: int
    use: AttentionUse = field(default_factory=AttentionUse)
    _last: tuple[list[int], SparseAttention | None] = field(default=([], None))

    def __post_init__(self) -> None:
        spec = self.model.spec
        layout = KVLayout(
            model="",
            dtype=str(self.model.dtype).removeprefix("torch."),
            num_layers=spec.num_layers,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
        )
        count = num_blocks(self.max_tokens)
        memory = memoryview(bytearray(memory_bytes(layout, count, keeps_stats=True)))
        self._store = KVStore(layout, count, memory, self.model.device, keeps_stats=True)

    @torch.inference_mode()
    def read(
        self, context: Sequence[int], sparse: SparseAttention | None, keep_from: int, start: int = 0
    ) -> torch.Tensor:
        """Prefill; hidden states after the last norm of the rows from `keep_from` on, `[n, hidden]`.

        What was read last of the same context goes on from its token `start`, a whole number of groups.
        """
        assert start % GROUP_TOKENS == 0
        self._last = list(context), sparse
        kept = []
        for first in range(start, len(context), CHUNK_TOKENS):
            end = min(first + CHUNK_TOKENS, len(context))
            span = Span(first, end - first, range(num_blocks(end)), sparse, len(context))
            rows = self._forward([list(context[first:end])], [span])
            kept.append(rows[max(0, keep_from - first) :])
        return torch.cat(kept)

    def shared_with_last(
        self, context: Sequence[int], sparse: SparseAttention | None, most_tokens: int
    ) -> int:
        """Tokens, at most `most_tokens`, whose KV is what these settings would compute: `read`'s `start`.

        Those before the first sparse one of either settings, if `context` is what was read last.
        """
        last, how = self._last
        shared = most_tokens if last[:most_tokens] == context[:most_tokens] else 0
        for own in (sparse, how):
            shared = shared if own is None else min(shared, own.first_sparse_position())
        return shared // GROUP_TOKENS * GROUP_TOKENS

    @torch.inference_mode()
    def ask(
        self,
        num_context: int,
        questions: Sequence[Sequence[int]],
        max_tokens: int,
        sparse: SparseAttention | None,
    ) -> list[list[int]]:
        """Greedy continuations, `max_tokens` each, of every question after the context read last."""
        assert num_context % GROUP_TOKENS == 0
        if not questions:
            return []
        self._last = self._last[0][:num_context], self._last[1]  # questions take the pages after it
        tables, free = [], num_blocks(num_context)
        for question in questions:
            own = num_blocks(len(question) + max_tokens)
            tables.append([*range(num_blocks(num_context)), *range(free, free + own)])
            free += own
        tokens = [list(question) for question in questions]
        self._prefill_questions(num_context, tokens, tables, sparse)
        for _ in range(max_tokens):
            starts = [num_context + len(own) - 1 for own in tokens]
            spans = [Span(start, 1, table, sparse) for start, table in zip(starts, tables, strict=True)]
            hidden = self._forward([[own[-1]] for own in tokens], spans)
            for own, token in zip(tokens, self.model.logits(hidden).argmax(-1).tolist(), strict=True):
                own.append(token)
        return [own[len(question) :] for own, question in zip(tokens, questions, strict=True)]

    def _prefill_questions(
        self, start: int, tokens: list[list[int]], tables: list[list[int]], sparse: SparseAttention | None
    ) -> None:
        """All but each question's last token, which is decode's first input."""
        lengths = [len(own) - 1 for own in tokens]
        spans = [
            Span(start, length, table, sparse, start + length)
            for length, table in zip(lengths, tables, strict=True)
        ]
        self._forward([own[:-1] for own in tokens], spans)

    def _forward(self, tokens: list[list[int]], spans: list[Span]) -> torch.Tensor:
        attend = PagedAttention(self._store, spans)
        flat = torch.tensor([token for own in tokens for token in own])
        positions = torch.cat([torch.arange(span.start, span.end) for span in spans])
        hidden = self.model.forward(flat, positions, attend)
        for use in attend.uses():
            self.use += use
        return hidden
