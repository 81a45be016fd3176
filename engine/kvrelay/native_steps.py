"""Decode steps in one C++ call, for batches whose rows attend alike.

Knows sequences, pages and settings of attention. Knows nothing of sampling.
"""

from collections.abc import Sequence

import torch

from kvrelay.attention.call import lists_per_group, pairs_read, selection_config
from kvrelay.cache.store import KVStore
from kvrelay.models.native import NativeDecoder
from kvrelay.scheduler.decode import DecodeSequence
from kvrelay.sparse import AttentionUse, SparseAttention, settings_of
from kvrelay.types import BLOCK_SIZE
from kvrelay_kernels.cpu.native.transformer import Pages, Selecting


class NativeSteps:
    """Steps of one decoder over one store; `sparse` is what requests without settings of their own get."""

    def __init__(self, decoder: NativeDecoder, store: KVStore, sparse: SparseAttention | None) -> None:
        self._decoder, self._store, self._sparse = decoder, store, sparse
        self._pages = pages_of(store)

    def run(self, batch: Sequence[DecodeSequence]) -> tuple[torch.Tensor, list[AttentionUse]] | None:
        """float32 logits [B, vocab] of each sequence's newest token, and what it read; K and V are stored.

        None, and nothing done, where rows attend in different ways, KV has yet to come, or another selector
        than `tree` was asked for.
        """
        ways = {self._way(sequence) for sequence in batch}
        sparse = ways.pop()
        if ways or any(sequence.arrivals is not None for sequence in batch):
            return None
        if sparse is not None and sparse.selector != "tree":
            return None
        selecting = None if sparse is None else self._selecting(sparse)
        tokens, lengths = zip(*((own.token_ids[-1], len(own.token_ids)) for own in batch), strict=True)
        tables = [sequence.block_ids for sequence in batch]
        logits, counts = self._decoder.step(tokens, lengths, tables, self._pages, selecting)
        pairs = zip(lengths, counts.tolist(), strict=True)
        return logits, [self._use(length, count, selecting) for length, count in pairs]

    def _way(self, sequence: DecodeSequence) -> SparseAttention | None:
        """How its newest token attends; None reads everything."""
        sparse = settings_of(sequence.request.params.attention, self._sparse)
        if sparse is None or sequence.num_cached < sparse.first_sparse_position(is_generated=True):
            return None
        return sparse

    def _selecting(self, sparse: SparseAttention) -> Selecting:
        spec = self._decoder.spec
        return Selecting(
            config=selection_config(sparse, self._store.num_blocks, one_by_one=True),
            lists_per_group=lists_per_group(sparse, spec.num_q_heads, spec.num_kv_heads),
            dense_layers=sparse.dense_layers,
        )

    def _use(self, length: int, count: int, selecting: Selecting | None) -> AttentionUse:
        spec = self._decoder.spec
        rows = spec.num_layers * spec.num_kv_heads
        if selecting is None:
            return AttentionUse(rows, rows * length, rows * length)
        dense_rows = len(selecting.dense_layers) * spec.num_kv_heads
        own = (length - 1) % BLOCK_SIZE + 1
        selected = pairs_read(count // selecting.lists_per_group, rows - dense_rows, 1, own)
        return AttentionUse(rows, dense_rows * length + selected, rows * length)


def pages_of(store: KVStore) -> Pages:
    """The pages and statistics of a store as a step takes them."""
    stats = [store.stats(layer) for layer in range(store.layout.num_layers)]
    return Pages([(layer[0], layer[1]) for layer in store.pages], [own for own in stats if own is not None])
