"""Reads one sequence of a paged batch on the host: the reference's only way into the cache."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kvrelay_kernels.errors import InvalidArgument
from kvrelay_kernels.layout import BLOCK_SIZE, PagedKV, num_blocks
from kvrelay_kernels.stats import KVBlockStats


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype the reference computes in: float64 stays, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceView:
    """One sequence of a paged cache. ``table`` holds its pages only, so nothing past the end is reachable."""

    kv: PagedKV
    table: Tensor  # [num_pages] int64, physical pages
    num_tokens: int
    stats: KVBlockStats | None = None

    @property
    def num_complete(self) -> int:
        """Pages that are full, hence have statistics."""
        return self.num_tokens // BLOCK_SIZE

    def keys(self, blocks: Tensor) -> Tensor:
        """Keys of logical ``blocks [heads, n]`` as ``[heads, n, 64, head_dim]``; -1 reads page 0."""
        return self._gather(self.kv.k_pages, blocks)

    def values(self, blocks: Tensor) -> Tensor:
        """Values of logical ``blocks [heads, n]`` as ``[heads, n, 64, head_dim]``; -1 reads page 0."""
        return self._gather(self.kv.v_pages, blocks)

    def statistic(self, name: str, homes: Tensor) -> Tensor:
        """Rows of statistic ``name`` at logical pages ``homes [heads, n]``; -1 reads page 0."""
        if self.stats is None:
            raise InvalidArgument("stats", needed="KVBlockStats of these pages for this selector", got=None)
        return self._gather(getattr(self.stats, name), homes)

    def _gather(self, pages: Tensor, blocks: Tensor) -> Tensor:
        heads = torch.arange(blocks.shape[0], device=blocks.device)[:, None]
        rows: Tensor = pages[self.table[blocks.clamp(min=0)], heads]
        return rows.to(compute_dtype(rows.dtype))


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """One sequence's query rows: ``q`` rows ``[first_row, first_row + q_len)``, its cache's last tokens."""

    sequence: int
    first_row: int
    q_len: int
    view: SequenceView

    @property
    def offset(self) -> int:
        """Absolute position of the first row."""
        return self.view.num_tokens - self.q_len


def sequence_view(kv: PagedKV, sequence: int, stats: KVBlockStats | None = None) -> SequenceView:
    """View of one sequence. Raises InvalidArgument if its length does not fit its block table."""
    num_tokens = int(kv.seq_lens[sequence])
    pages = num_blocks(num_tokens)
    if num_tokens < 0 or pages > kv.block_table.shape[1]:
        raise InvalidArgument(
            "seq_lens",
            needed=f"0 to {kv.block_table.shape[1] * BLOCK_SIZE} (block_table's width)",
            got=f"{num_tokens} for sequence {sequence}",
        )
    table = kv.block_table[sequence, :pages].long()
    if pages and not (int(table.min()) >= 0 and int(table.max()) < kv.k_pages.shape[0]):
        raise InvalidArgument(
            "block_table",
            needed=f"pages below {kv.k_pages.shape[0]} for the {pages} pages of sequence {sequence}",
            got=f"{int(table.min())} to {int(table.max())}",
        )
    return SequenceView(kv=kv, table=table, num_tokens=num_tokens, stats=stats)


def iterate_chunks(
    kv: PagedKV, cu_seqlens_q: Tensor | None, total_q: int, stats: KVBlockStats | None = None
) -> Iterator[Chunk]:
    """Every non-empty chunk of the batch; ``cu_seqlens_q=None`` means decode, one row per sequence.

    A decode row of a sequence without tokens is skipped. Raises InvalidArgument on inconsistent lengths.
    """
    bounds = list(range(kv.batch + 1)) if cu_seqlens_q is None else [int(bound) for bound in cu_seqlens_q]
    if bounds[0] != 0 or bounds[-1] != total_q or sorted(bounds) != bounds:
        raise InvalidArgument("cu_seqlens_q", needed=f"ascending from 0 to total_q ({total_q})", got=bounds)
    for sequence, (first, last) in enumerate(pairwise(bounds)):
        view = sequence_view(kv, sequence, stats)
        empty_decode = cu_seqlens_q is None and view.num_tokens == 0
        if last == first or empty_decode:
            continue
        if last - first > view.num_tokens:
            raise InvalidArgument(
                "seq_lens",
                needed=f"at least q_len ({last - first}) for sequence {sequence}: it counts the chunk",
                got=view.num_tokens,
            )
        yield Chunk(sequence=sequence, first_row=first, q_len=last - first, view=view)
