"""Batches to tensors to tokens: the only place that calls the model.

Knows sequences, pages and logits. Knows nothing about queues, sockets or time.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from kvrelay.attention import PagedAttention, Span
from kvrelay.cache.arrivals import Lacking, Tiles
from kvrelay.cache.store import KVStore
from kvrelay.decode_steps import DecodeSteps, Tokens
from kvrelay.models.decoder import Decoder
from kvrelay.models.native import NativeDecoder
from kvrelay.native_steps import NativeSteps
from kvrelay.sampler import Row, Sampled, is_plain, sample, score
from kvrelay.scheduler.decode import DecodeSequence
from kvrelay.scheduler.prefill import Chunk
from kvrelay.sparse import AttentionUse, SparseAttention, settings_of
from kvrelay.types import RequestSpec, TokenLogprobs

SCORED_ROWS = 64


class Runner:
    """Runs prefill chunks and decode batches of one model over one store.

    `sparse` is what requests without settings of their own get, its `dense_below_tokens` measured; None is
    dense. `steps`, for a dense torch decoder, runs decode over tensors in place. `attention` says what the
    last forward pass read, span by span; empty without `sparse`.
    """

    def __init__(
        self,
        decoder: Decoder | NativeDecoder,
        store: KVStore,
        eos_token_ids: frozenset[int],
        sparse: SparseAttention | None = None,
        steps: DecodeSteps | None = None,
    ) -> None:
        self.decoder, self.store, self.eos_token_ids = decoder, store, eos_token_ids
        self.sparse, self.steps = sparse, steps
        self._native = NativeSteps(decoder, store, sparse) if isinstance(decoder, NativeDecoder) else None
        self.attention: list[AttentionUse] = []
        self.watched: list[Tiles] = []

    @property
    def impl(self) -> str:
        """What computes, and how decode steps run where that is not layer by layer."""
        return self.decoder.impl if self.steps is None else f"{self.decoder.impl}, {self.steps.impl}"

    @torch.inference_mode()
    def prefill(self, chunks: Sequence[Chunk], after_layer: Callable[[int], None]) -> torch.Tensor:
        """Compute the chunks' K and V into their pages; `after_layer(i)` follows each layer.

        `watched` then has, of each chunk that `foresees`, the tiles that decode's first step will read: that
        token's row is computed along, for these alone.
        Returns the hidden states of the chunks' tokens, one chunk after the other, [T, hidden]; none where no
        request wants its prompt scored, as what follows the last layer's attention is then not computed.
        """
        ahead = [index for index, chunk in enumerate(chunks) if chunk.has_room_ahead]
        parts = [
            (chunk.job, chunk.start, chunk.length, chunk.foresees and not chunk.has_room_ahead)
            for chunk in chunks
        ]
        parts += [(chunks[index].job, chunks[index].job.num_tokens, 1, True) for index in ahead]
        spans, tokens = list[Span](), list[int]()
        for job, start, length, is_watched in parts:
            prompt_end = job.request.num_prompt_tokens - 1  # from here on decode computed, the first time
            sparse = self.sparse_of(job.request)
            spans.append(Span(start, length, job.block_ids, sparse, prompt_end, is_watched))
            tokens += job.request.token_ids[start : start + length]
        kv_only = all(chunk.job.request.prompt_logprobs is None for chunk in chunks)
        hidden = self._forward(tokens, spans, after_layer, kv_only=kv_only)
        for index, tiles in zip(ahead, self.watched[len(chunks) :], strict=True):
            self.watched[index] = tiles
        del self.watched[len(chunks) :], self.attention[len(chunks) :]
        return hidden

    def score(self, chunk: Chunk, hidden: torch.Tensor) -> Iterator[tuple[int, list[TokenLogprobs]]]:
        """Log-probabilities of the prompt tokens that follow those of `hidden [chunk.length, hidden]`.

        Yields (index of the first token, log-probabilities) by slices of `SCORED_ROWS`: logits are
        [rows, vocab], far more than the hidden states they come from.
        """
        request = chunk.job.request
        assert request.prompt_logprobs is not None
        following = request.token_ids[chunk.start + 1 : request.num_prompt_tokens][: chunk.length]
        for first in range(0, len(following), SCORED_ROWS):
            targets = following[first : first + SCORED_ROWS]
            with torch.inference_mode():
                logits = self.decoder.logits(hidden[first : first + len(targets)])
                found = score(logits, targets, request.prompt_logprobs)
            yield chunk.start + 1 + first, found

    @torch.inference_mode()
    def decode(self, batch: Sequence[DecodeSequence]) -> list[Sampled | Lacking | None]:
        """One more token for each sequence, None where its logits are not finite; stores its K and V.

        `Lacking` where some of the KV that the token reads has not come yet: then the step is to be repeated.
        """
        results = sample(self.logits(batch), [self._row(sequence) for sequence in batch])
        lacking = self.watched or [{}] * len(batch)
        for row, tiles in enumerate(lacking):
            if tiles and self.attention:
                self.attention[row] = AttentionUse()  # the step will be repeated
        return [Lacking(tiles) if tiles else result for tiles, result in zip(lacking, results, strict=True)]

    def runs_ahead(self, sequences: Iterable[DecodeSequence]) -> bool:
        """Whether steps of these sequences can begin before the tokens of the one before are known."""
        return self.steps is not None and all(is_plain(sequence.request.params) for sequence in sequences)

    def launch(self, batch: Sequence[DecodeSequence]) -> Tokens:
        """Begin what `decode` does; where `runs_ahead(batch)`, the newest tokens may be those of a step that
        has not been waited for.
        """
        if self.steps is None or not self.runs_ahead(batch):
            sampled = self.decode(batch)
            return lambda: sampled
        self.attention = []
        return self.steps.launch(batch, [self._row(sequence) for sequence in batch])

    def sparse_of(self, request: RequestSpec) -> SparseAttention | None:
        """The request's settings, or the engine's; None is dense."""
        return settings_of(request.params.attention, self.sparse)

    def attention_by(self, requests: Sequence[RequestSpec]) -> dict[str, AttentionUse]:
        """What the last forward pass read, by request id; `requests` are those of its spans, in order."""
        uses: dict[str, AttentionUse] = {}
        for request, use in zip(requests, self.attention, strict=False):
            uses[request.request_id] = uses.get(request.request_id, AttentionUse()) + use
        return uses

    def copy_fence(self) -> Callable[[], None] | None:
        """A wait for what has been launched so far, for the thread that copies it; None when all is done."""
        if self.store.device.type != "cuda":
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event.synchronize

    def logits(self, batch: Sequence[DecodeSequence]) -> torch.Tensor:
        """float32 logits [B, vocab] of each sequence's newest token, whose K and V are stored."""
        if self.steps is not None:
            self.attention = []
            return self.steps.logits(batch)
        stepped = None if self._native is None else self._native.run(batch)
        if stepped is not None:
            self.attention, self.watched = stepped[1] if self.sparse is not None else [], []
            return stepped[0]
        tokens = [sequence.token_ids[-1] for sequence in batch]
        spans = [
            Span(
                start=sequence.num_cached,
                length=1,
                block_ids=sequence.block_ids,
                sparse=self.sparse_of(sequence.request),
                is_watched=sequence.arrivals is not None,
                arrivals=sequence.arrivals,
            )
            for sequence in batch
        ]
        return self.decoder.logits(self._forward(tokens, spans, None))

    def _forward(
        self,
        tokens: list[int],
        spans: list[Span],
        after_layer: Callable[[int], None] | None,
        *,
        kv_only: bool = False,
    ) -> torch.Tensor:
        device = self.store.device
        positions = torch.cat([torch.arange(span.start, span.end) for span in spans])
        attend = PagedAttention(self.store, spans, after_layer)
        token_ids = torch.tensor(tokens, device=device)
        hidden = self.decoder.forward(token_ids, positions.to(device), attend, kv_only=kv_only)
        self.attention = attend.uses() if self.sparse is not None else []
        self.watched = attend.watched()
        return hidden

    def _row(self, sequence: DecodeSequence) -> Row:
        request = sequence.request
        eos = tuple(self.eos_token_ids)
        return Row(request.params, request.seed, sequence.token_ids, request.num_prompt_tokens, eos)
