"""What a selector's launcher gets: the batch, the settings, and the outputs to fill."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvrelay_kernels.errors import InvalidArgument
from kvrelay_kernels.layout import PagedKV, num_query_block_slots
from kvrelay_kernels.selection import SelectionConfig
from kvrelay_kernels.stats import KVBlockStats
from kvrelay_kernels.triton.schedule import num_group_slots, query_tile_bounds, sibling_group_bounds
from kvrelay_kernels.triton.tiles import LOG2E


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectRequest:
    """One call of ``select_blocks``. ``indices``, ``counts`` and ``cu_q_blocks`` as in ``BlockSelection``.

    cu_seqlens_q: rows of each sequence; in decode, one each.
    """

    q: Tensor
    kv: PagedKV
    config: SelectionConfig
    cu_seqlens_q: Tensor
    stats: KVBlockStats | None
    scale: float
    decode: bool
    indices: Tensor
    counts: Tensor
    cu_q_blocks: Tensor

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.q.shape[1] // self.kv.num_kv_heads

    @property
    def siblings(self) -> int:
        """Query blocks per sibling group."""
        return 1 if self.decode else self.config.sibling_blocks

    @property
    def scale_log2(self) -> float:
        return float(self.scale * LOG2E.value)

    def groups(self, siblings: int) -> tuple[Tensor, int]:
        """First sibling group of every sequence, ``[batch + 1]``, and the most groups there can be."""
        if self.decode or siblings == 1:
            return self.cu_q_blocks, self.indices.shape[0]
        bounds = sibling_group_bounds(self.cu_seqlens_q, self.kv.seq_lens.contiguous(), siblings)
        return bounds, num_group_slots(self.q.shape[0], self.kv.batch, siblings)

    def statistics(self, *names: str) -> tuple[Any, ...]:
        """Pointer and strides (page, head, channel) of each named statistic."""
        if self.stats is None:
            raise InvalidArgument("stats", needed="KVBlockStats of these pages for this selector", got=None)
        tensors = [getattr(self.stats, name) for name in names]
        return tuple(argument for tensor in tensors for argument in (tensor, *tensor.stride()))


def select_request(
    q: Tensor,
    kv: PagedKV,
    config: SelectionConfig,
    cu_seqlens_q: Tensor | None,
    stats: KVBlockStats | None,
    scale: float,
) -> SelectRequest:
    """Outputs from host-known sizes only. In decode every row is written; else unused rows stay -1 and 0."""
    decode = cu_seqlens_q is None
    slots = kv.batch if decode else num_query_block_slots(q.shape[0], kv.batch)
    shape = (slots, kv.num_kv_heads, config.budget)
    if cu_seqlens_q is None:
        rows = torch.arange(kv.batch + 1, dtype=torch.int32, device=q.device)
        bounds = rows
        indices = torch.empty(shape, dtype=torch.int32, device=q.device)
        counts = torch.empty(shape[:2], dtype=torch.int32, device=q.device)
    else:
        rows = cu_seqlens_q.contiguous()
        bounds = query_tile_bounds(rows)
        indices = torch.full(shape, -1, dtype=torch.int32, device=q.device)
        counts = torch.zeros(shape[:2], dtype=torch.int32, device=q.device)
    return SelectRequest(
        q=q,
        kv=kv,
        config=config,
        cu_seqlens_q=rows,
        stats=stats,
        scale=scale,
        decode=decode,
        indices=indices,
        counts=counts,
        cu_q_blocks=bounds,
    )
