"""Dense attention with torch alone: `scaled_dot_product_attention` over gathered pages.

For devices and dtypes that the kernel library's fast dense kernels do not cover.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional

from kvrelay.types import BLOCK_SIZE, num_blocks


class GatheredPrefill:
    """Chunks of prompts, each causal and aligned to the end of its cache: `(start, end, block ids)`."""

    def __init__(self, chunks: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        self._chunks = chunks

    def __call__(self, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor) -> torch.Tensor:
        """q and out `[T, num_q_heads, head_dim]`, the chunks one after the other."""
        out = torch.empty_like(q)
        first = 0
        for start, end, block_ids in self._chunks:
            last = first + end - start
            table = torch.tensor([block_ids[: num_blocks(end)]], device=q.device)
            keys, values = (_gather(pages, table)[0, :, :end] for pages in (k_pages, v_pages))
            out[first:last] = _causal(q[first:last], keys, values)
            first = last
        return out


class GatheredDecode:
    """One query per sequence of `lengths` tokens; the heads of a KV group are rows of one small attention."""

    def __init__(self, tables: Sequence[Sequence[int]], lengths: Sequence[int], device: torch.device) -> None:
        width = max(num_blocks(length) for length in lengths)
        # padded with their own first block, so that no foreign page is ever read
        rows = [[*table, *[table[0]] * (width - len(table))] for table in tables]
        self._table = torch.tensor(rows, device=device)
        mask = torch.arange(width * BLOCK_SIZE)[None] < torch.tensor(lengths)[:, None]
        self._mask = mask[:, None, None].to(device)
        self._tail_rows, self._tail_slots = _tails(lengths, device)

    def __call__(self, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor) -> torch.Tensor:
        """q and out `[B, num_q_heads, head_dim]`."""
        num_sequences, num_q_heads, head_dim = q.shape
        num_kv_heads = k_pages.shape[1]
        rows = q.reshape(num_sequences, num_kv_heads, num_q_heads // num_kv_heads, head_dim)
        k, v = (_gather(pages, self._table) for pages in (k_pages, v_pages))
        for gathered in (k, v):  # a masked slot still counts as 0 x NaN if an earlier owner left NaN there
            gathered[self._tail_rows, :, self._tail_slots] = 0
        out = functional.scaled_dot_product_attention(rows, k, v, attn_mask=self._mask)
        return out.reshape(num_sequences, num_q_heads, head_dim)


def _causal(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """q `[T, num_q_heads, head_dim]`, rows of the last T of the keys `[num_kv_heads, n, head_dim]`."""
    length, num_q_heads, head_dim = q.shape
    num_kv_heads, num_keys = keys.shape[:2]
    shape = (num_kv_heads, num_q_heads // num_kv_heads, -1, head_dim)
    k, v = (tensor[:, None].expand(shape) for tensor in (keys, values))
    rows = q.transpose(0, 1).reshape(shape)
    if length == num_keys:
        out = functional.scaled_dot_product_attention(rows, k, v, is_causal=True)
    else:
        positions = torch.arange(num_keys - length, num_keys, device=q.device)
        mask = torch.arange(num_keys, device=q.device)[None] <= positions[:, None]
        out = functional.scaled_dot_product_attention(rows, k, v, attn_mask=mask)
    return out.reshape(num_q_heads, length, head_dim).transpose(0, 1)


def _gather(pages: torch.Tensor, block_table: torch.Tensor) -> torch.Tensor:
    """Pages of each row of the table, `[B, num_kv_heads, max_blocks * block_size, head_dim]`."""
    num_sequences, max_blocks = block_table.shape
    _, num_kv_heads, block_size, head_dim = pages.shape
    gathered = pages[block_table].transpose(1, 2)
    return gathered.reshape(num_sequences, num_kv_heads, max_blocks * block_size, head_dim)


def _tails(lengths: Sequence[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and slot of every unused place in each sequence's last page, as two index lists."""
    rows: list[int] = []
    slots: list[int] = []
    for row, length in enumerate(lengths):
        unused = range(length, num_blocks(length) * BLOCK_SIZE)
        rows += [row] * len(unused)
        slots += unused
    return torch.tensor(rows, dtype=torch.int64, device=device), torch.tensor(
        slots, dtype=torch.int64, device=device
    )
