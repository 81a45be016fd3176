"""Random paged batches, poison where no kernel may look, and an eager attention of their own."""

import os
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvrelay_kernels import BLOCK_SIZE, BlockSelection, PagedKV

ABSURD = 2**31 - 7
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
TRITON = INTERPRETED or DEVICE.type == "cuda"
EXACT = torch.float32 if TRITON else torch.float64
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
if TRITON:  # no float64 kernels; the interpreter is silently wrong for bf16
    DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A prefill batch; ``keys`` and ``values`` per sequence, ``[num_kv_heads, seq_len, head_dim]``."""

    q: Tensor
    kv: PagedKV
    cu_seqlens_q: Tensor
    keys: list[Tensor]
    values: list[Tensor]

    @property
    def q_lens(self) -> list[int]:
        return self.cu_seqlens_q.diff().tolist()


def make_batch(
    lengths: list[tuple[int, int]],
    *,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 64,
    dtype: torch.dtype = EXACT,
    seed: int = 0,
) -> Batch:
    """Sequences of ``(offset, q_len)``: pages shuffled, NaN past ends, absurd table entries, odd strides."""
    generator = torch.Generator().manual_seed(seed)
    num_q_heads, num_kv_heads = heads
    totals = [offset + q_len for offset, q_len in lengths]
    pages = [-(-total // BLOCK_SIZE) for total in totals]
    keys, values = (
        [
            torch.randn(num_kv_heads, total, head_dim, generator=generator).to(DEVICE, dtype)
            for total in totals
        ]
        for _ in range(2)
    )
    order = torch.randperm(sum(pages) + 2, generator=generator)
    table = torch.full((len(lengths), max(pages, default=0) + 2), ABSURD, dtype=torch.int32, device=DEVICE)
    wide = (sum(pages) + 2, num_kv_heads, BLOCK_SIZE, head_dim + 8)
    k_pages, v_pages = (
        torch.full(wide, torch.nan, dtype=dtype, device=DEVICE)[..., :head_dim] for _ in range(2)
    )
    used = 0
    for sequence, count in enumerate(pages):
        table[sequence, :count] = order[used : used + count]
        for page in range(count):
            rows = slice(page * BLOCK_SIZE, (page + 1) * BLOCK_SIZE)
            filled = keys[sequence][:, rows].shape[1]
            k_pages[order[used + page], :, :filled] = keys[sequence][:, rows]
            v_pages[order[used + page], :, :filled] = values[sequence][:, rows]
        used += count
    q = torch.randn(sum(q_len for _, q_len in lengths), head_dim, num_q_heads, generator=generator)
    cu_seqlens_q = torch.tensor([0, *(q_len for _, q_len in lengths)]).cumsum(0).to(DEVICE, torch.int32)
    seq_lens = torch.tensor(totals, dtype=torch.int32, device=DEVICE)
    kv = PagedKV(k_pages=k_pages, v_pages=v_pages, block_table=table, seq_lens=seq_lens)
    return Batch(
        q=q.to(DEVICE, dtype).transpose(1, 2), kv=kv, cu_seqlens_q=cu_seqlens_q, keys=keys, values=values
    )


def decode_queries(batch: Batch, seed: int = 1) -> Tensor:
    """One query per sequence, ``[batch, num_q_heads, head_dim]``."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch.kv.batch, *batch.q.shape[1:])
    return torch.randn(shape, generator=generator).to(batch.q)


def random_selection(batch: Batch, budget: int, *, decode: bool = False, seed: int = 2) -> BlockSelection:
    """Random causal lists, the own block always in, of random lengths up to ``budget``, in random order."""
    generator = torch.Generator().manual_seed(seed)
    q_lens = [1] * batch.kv.batch if decode else batch.q_lens
    blocks_of = [1 if decode else -(-q_len // BLOCK_SIZE) for q_len in q_lens]
    slots = batch.kv.batch if decode else (sum(q_lens) + 63 * batch.kv.batch) // BLOCK_SIZE
    heads = batch.kv.num_kv_heads
    indices = torch.full((slots, heads, budget), -1, dtype=torch.int32)
    counts = torch.zeros(slots, heads, dtype=torch.int32)
    slot = 0
    for total, q_len, count in zip(batch.kv.seq_lens.tolist(), q_lens, blocks_of, strict=True):
        for block in range(count):
            own = (total - q_len) // BLOCK_SIZE + block
            for head in range(heads if total else 0):
                others = torch.randperm(own, generator=generator)[: budget - 1]
                listed = torch.cat([others, torch.tensor([own])])
                indices[slot, head, : len(listed)] = listed[torch.randperm(len(listed), generator=generator)]
                counts[slot, head] = len(listed)
            slot += 1
    bounds = torch.tensor([0, *blocks_of]).cumsum(0).to(torch.int32)
    indices, counts, bounds = (tensor.to(DEVICE) for tensor in (indices, counts, bounds))
    return BlockSelection(indices=indices, counts=counts, cu_q_blocks=bounds)


def poison_unselected(batch: Batch, selection: BlockSelection) -> Batch:
    """NaN in every (page, head) that no list of its sequence names."""
    k_pages, v_pages = batch.kv.k_pages.clone(), batch.kv.v_pages.clone()
    unread = torch.ones(k_pages.shape[:2], dtype=torch.bool, device=DEVICE)
    bounds = selection.cu_q_blocks.tolist()
    for sequence in range(batch.kv.batch):
        for slot in range(bounds[sequence], bounds[sequence + 1]):
            for head in range(batch.kv.num_kv_heads):
                listed = selection.indices[slot, head, : selection.counts[slot, head]].long()
                unread[batch.kv.block_table[sequence, listed].long(), head] = False
    k_pages[unread] = torch.nan
    v_pages[unread] = torch.nan
    return replace(batch, kv=replace(batch.kv, k_pages=k_pages, v_pages=v_pages))


def eager(
    batch: Batch, q: Tensor, q_lens: list[int], selection: BlockSelection | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Plain masked softmax over whole sequences in ``dtype``; ``selection=None`` is dense."""
    outs, lses, row = [], [], 0
    group = q.shape[1] // batch.kv.num_kv_heads
    for sequence, q_len in enumerate(q_lens):
        keys = batch.keys[sequence].to(dtype).repeat_interleave(group, 0)
        values = batch.values[sequence].to(dtype).repeat_interleave(group, 0)
        total = keys.shape[1]
        q_len_here = min(q_len, total)
        rows = q[row : row + q_len_here].to(dtype).transpose(0, 1)
        mask = _mask(sequence, q_len_here, total, selection, batch.kv.num_kv_heads).repeat_interleave(
            group, 0
        )
        logits = (rows @ keys.transpose(1, 2) * q.shape[2] ** -0.5).masked_fill(~mask, -torch.inf)
        out = logits.softmax(-1).nan_to_num(0.0) @ values
        missing = q_len - q_len_here
        outs.append(torch.nn.functional.pad(out.transpose(0, 1), (0, 0, 0, 0, 0, missing)))
        lse = logits.logsumexp(-1) if total else logits.sum(-1)
        lses.append(torch.nn.functional.pad(lse.T, (0, 0, 0, missing), value=-torch.inf))
        row += q_len
    return torch.cat(outs), torch.cat(lses)


def _mask(sequence: int, q_len: int, total: int, selection: BlockSelection | None, heads: int) -> Tensor:
    position = torch.arange(total - q_len, total, device=DEVICE)
    key = torch.arange(total, device=DEVICE)
    mask = (key <= position[:, None]).expand(heads, -1, -1).clone()
    if selection is None:
        return mask
    first = int(selection.cu_q_blocks[sequence])
    start = (total - q_len) // BLOCK_SIZE
    for row in range(q_len):
        slot = first + (total - q_len + row) // BLOCK_SIZE - start
        for head in range(heads):
            listed = selection.indices[slot, head, : selection.counts[slot, head]]
            mask[head, row] &= torch.isin(key // BLOCK_SIZE, listed)
    return mask


def assert_accurate(
    got: tuple[Tensor, Tensor], batch: Batch, q: Tensor, q_lens: list[int], selection
) -> None:
    """Error against float64 at most twice plain eager's at the same precision, plus the result's rounding."""
    exact_out, exact_lse = eager(batch, q, q_lens, selection, torch.float64)
    plain_out, plain_lse = eager(batch, q, q_lens, selection, q.dtype)
    assert got[0].dtype == q.dtype
    assert got[0].shape == exact_out.shape
    for mine, plain, exact in ((got[0], plain_out, exact_out), (got[1], plain_lse, exact_lse)):
        assert torch.equal(mine.isinf(), exact.isinf())
        finite = ~exact.isinf()
        if not finite.any():
            continue
        scale = exact[finite].abs().max().item()
        rounding = 4 * torch.finfo(mine.dtype).eps * scale
        error = (mine.double() - exact)[finite].abs().max().item()
        allowed = 2 * (plain.double() - exact)[finite].abs().max().item() + rounding
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
