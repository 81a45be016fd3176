"""Batches to tensors to tokens: the only place that calls the model.

Knows sequences, pages and logits. Knows nothing about queues, sockets or time.
"""

from collections.abc import Callable, Sequence

import torch

from kvrelay.attention import PagedAttention, Span
from kvrelay.cache.store import KVStore
from kvrelay.models.decoder import Decoder
from kvrelay.sampler import Row, sample
from kvrelay.scheduler.decode import DecodeSequence
from kvrelay.scheduler.prefill import Chunk
from kvrelay.types import TokenLogprobs


class Runner:
    """Runs prefill chunks and decode batches of one model over one store."""

    def __init__(self, decoder: Decoder, store: KVStore, eos_token_ids: frozenset[int]) -> None:
        self.decoder, self.store, self.eos_token_ids = decoder, store, eos_token_ids

    @torch.inference_mode()
    def prefill(self, chunks: Sequence[Chunk], after_layer: Callable[[int], None]) -> None:
        """Compute the chunks' K and V into their pages; `after_layer(i)` follows each layer."""
        spans = [Span(chunk.start, chunk.length, chunk.job.block_ids) for chunk in chunks]
        tokens = [
            token
            for chunk in chunks
            for token in chunk.job.request.token_ids[chunk.start : chunk.start + chunk.length]
        ]
        self._forward(tokens, spans, after_layer)

    @torch.inference_mode()
    def decode(self, batch: Sequence[DecodeSequence]) -> list[tuple[int, TokenLogprobs | None]]:
        """One more token for each sequence; its last token's K and V are stored on the way."""
        spans = [Span(sequence.num_cached, 1, sequence.block_ids) for sequence in batch]
        hidden = self._forward([sequence.token_ids[-1] for sequence in batch], spans, None)
        return sample(self.decoder.logits(hidden), [self._row(sequence) for sequence in batch])

    def copy_fence(self) -> Callable[[], None] | None:
        """A wait for everything computed so far, for a thread that copies it; None when nothing is pending."""
        if self.store.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record()
        return event.synchronize

    def _forward(
        self, tokens: list[int], spans: list[Span], after_layer: Callable[[int], None] | None
    ) -> torch.Tensor:
        device = self.store.device
        positions = torch.cat([torch.arange(span.start, span.end) for span in spans])
        attend = PagedAttention(self.store, spans, after_layer)
        return self.decoder.forward(torch.tensor(tokens, device=device), positions.to(device), attend)

    def _row(self, sequence: DecodeSequence) -> Row:
        request = sequence.request
        eos = tuple(self.eos_token_ids)
        return Row(request.params, request.seed, sequence.token_ids, request.num_prompt_tokens, eos)
