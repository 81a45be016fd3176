"""Decode steps over tensors that never move, so that CUDA graphs can replay them, one ahead of their tokens.

A batch takes the smallest of a few sizes that holds it. Rows without a sequence attend to nothing and write
to the store's spare page. A step reads the tokens of the one before where that left them, on the device: the
host writes its inputs and collects its tokens while the device computes.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kvrelay.cache.arrivals import Lacking
from kvrelay.cache.store import KVStore
from kvrelay.models.decoder import Decoder
from kvrelay.sampler import Row, Sampled, choose
from kvrelay.scheduler.decode import PENDING, DecodeSequence
from kvrelay.types import BLOCK_SIZE
from kvrelay_kernels import PagedKV, paged_decode

Tokens = Callable[[], Sequence[Sampled | Lacking | None]]
"""Waits for a step's tokens, one per sequence; None where the logits hold no finite largest."""


def sizes_up_to(most: int) -> list[int]:
    """Batch sizes that steps are made for: powers of two, and the largest batch there can be."""
    sizes = [1 << power for power in range(most.bit_length()) if 1 << power < most]
    return [*sizes, most]


class DecodeSteps:
    """Runs decode steps of one model over one store that has a spare page.

    `max_blocks` is the most pages a sequence may have. Everything runs on the current stream, so pages that a
    sequence gave up are written by whoever has them next after the steps that still knew them.
    """

    def __init__(self, decoder: Decoder, store: KVStore, max_num_seqs: int, max_blocks: int) -> None:
        self._decoder, self._store, self.sizes = decoder, store, sizes_up_to(max_num_seqs)
        device = store.device
        # of each row: its token, the row of the step before that chose it (-1: none), its position (-1: none)
        self._inputs = torch.full((3, max_num_seqs), -1, dtype=torch.int64, device=device)
        self._table = torch.zeros(max_num_seqs, max_blocks, dtype=torch.int32, device=device)
        self._chosen = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._held: list[tuple[DecodeSequence | None, int]] = [
            (None, 0)
        ] * max_num_seqs  # in the table's rows
        self._rows: dict[DecodeSequence, int] = {}  # of the last step
        self._graphs: dict[int, tuple[Any, torch.Tensor]] = {}

    @property
    def impl(self) -> str:
        """How steps run."""
        return "CUDA graphs" if self._graphs else "steps in place"

    @torch.inference_mode()
    def capture(self) -> float:
        """Capture a CUDA graph of every size; the seconds that took. Kernels are compiled on the way."""
        start_s = time.monotonic()
        memory = None
        for size in reversed(self.sizes):
            self._compute(size)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
                logits = self._compute(size)
            memory = graph.pool()
            self._graphs[size] = (graph, logits)
        torch.cuda.synchronize()
        return time.monotonic() - start_s

    @torch.inference_mode()
    def launch(self, batch: Sequence[DecodeSequence], rows: Sequence[Row]) -> Tokens:
        """Begin one more token for each sequence. Newest ones may be `PENDING` if the last step has them."""
        chosen = choose(self.logits(batch), rows)
        self._chosen[: len(batch)] = chosen
        self._rows = {sequence: row for row, sequence in enumerate(batch)}
        if chosen.device.type != "cuda":
            return lambda: _results(chosen)
        arrived = torch.empty(chosen.shape, dtype=chosen.dtype, pin_memory=True)
        arrived.copy_(chosen, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()

        def wait() -> list[Sampled | None]:
            event.synchronize()
            return _results(arrived)

        return wait

    @torch.inference_mode()
    def logits(self, batch: Sequence[DecodeSequence]) -> torch.Tensor:
        """float32 logits [B, vocab] of each sequence's newest token; they hold until the next step."""
        size = next(size for size in self.sizes if size >= len(batch))
        self._inputs[:, :size] = self._to_device(self._input_rows(batch, size))
        self._update_table(batch)
        if size not in self._graphs:
            return self._compute(size)[: len(batch)]
        graph, logits = self._graphs[size]
        graph.replay()
        return logits[: len(batch)]

    def _input_rows(self, batch: Sequence[DecodeSequence], size: int) -> torch.Tensor:
        unused = [-1] * (size - len(batch))
        tokens = [sequence.token_ids[-1] for sequence in batch]
        sources = [
            self._rows[sequence] if token == PENDING else -1
            for sequence, token in zip(batch, tokens, strict=True)
        ]
        positions = [sequence.num_cached for sequence in batch]
        return torch.tensor([[*row, *unused] for row in (tokens, sources, positions)])

    def _update_table(self, batch: Sequence[DecodeSequence]) -> None:
        """Write the pages of rows that changed hands or grew: of a steady batch one row in 64 a step."""
        for row, sequence in enumerate(batch):
            held = (sequence, len(sequence.block_ids))
            if self._held[row] != held:
                pages = torch.tensor(sequence.block_ids, dtype=torch.int32)
                self._table[row, : len(pages)] = self._to_device(pages)
                self._held[row] = held

    def _to_device(self, host: torch.Tensor) -> torch.Tensor:
        """A copy that nobody waits for; pinned memory is not used again before the copy is over."""
        return host if self._store.device.type != "cuda" else host.pin_memory().cuda(non_blocking=True)

    def _compute(self, size: int) -> torch.Tensor:
        """Logits [size, vocab] from the tensors as they are; what a graph captures. Asks the host nothing."""
        tokens, sources, positions = self._inputs[:, :size]
        tokens = torch.where(sources < 0, tokens, self._chosen[sources.clamp(min=0)]).clamp(min=0)
        has_sequence, positions = positions >= 0, positions.clamp(min=0)
        table = self._table[:size]
        pages = table.gather(1, (positions // BLOCK_SIZE)[:, None])[:, 0].long()
        pages = torch.where(has_sequence, pages, self._store.num_blocks)  # the spare page
        offsets = positions % BLOCK_SIZE
        lengths = torch.where(has_sequence, positions + 1, 0).to(torch.int32)

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            k_pages, v_pages = self._store.layer(layer)
            k_pages[pages, :, offsets] = k
            v_pages[pages, :, offsets] = v
            kv = PagedKV(k_pages=k_pages, v_pages=v_pages, block_table=table, seq_lens=lengths)
            return paged_decode(q, kv)[0]

        return self._decoder.logits(self._decoder.forward(tokens, positions, attend))


def _results(chosen: torch.Tensor) -> list[Sampled | None]:
    return [None if token < 0 else (token, None) for token in chosen.tolist()]
