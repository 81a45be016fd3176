"""Every GPU kernel against the float64 reference, before anything is timed."""

import torch
from torch import Tensor

import kvrelay_kernels as kk
from gpu_run import Record, Setting, chunk, contiguous, make_cache, make_queries


def gate_correctness(setting: Setting, record: Record) -> None:
    """Every operation against the float64 reference: error at most twice plain eager's, plus rounding."""
    tokens = 200 if setting.dry_run else 2000
    kv, q = make_cache([tokens], setting), make_queries(tokens, setting)
    cu = chunk(tokens, setting)
    exact = kk.PagedKV(
        k_pages=kv.k_pages.double(),
        v_pages=kv.v_pages.double(),
        block_table=kv.block_table,
        seq_lens=kv.seq_lens,
    )
    keys, values = (t.repeat_interleave(q.shape[1] // kv.num_kv_heads, 1)[0] for t in contiguous(kv))
    logits = q.transpose(0, 1) @ keys.transpose(1, 2) * setting.head_dim**-0.5
    hidden = torch.ones_like(logits[0], dtype=torch.bool).triu(1)
    eager = (logits.masked_fill(hidden, -torch.inf).softmax(-1) @ values).transpose(0, 1)
    dense = kk.paged_prefill(q.double(), exact, cu, impl="reference")[0]
    eps = torch.finfo(setting.dtype).eps
    allowed = 2 * (eager - dense).abs().max().item() + 4 * eps * dense.abs().max().item()

    def within(got: Tensor, want: Tensor) -> bool:
        return bool((got - want).abs().max().item() <= allowed)

    record.gates["prefill"] = within(kk.paged_prefill(q, kv, cu, impl="triton")[0], dense)
    stats = kk.kv_block_stats(kv, impl="triton")
    config = kk.SelectionConfig(budget=4 if setting.dry_run else 12)
    chosen = kk.select_blocks(q, kv, config, cu_seqlens_q=cu, stats=stats, impl="triton")
    want = kk.block_sparse_prefill(q.double(), exact, cu, chosen, impl="reference")[0]
    record.gates["sparse"] = within(kk.block_sparse_prefill(q, kv, cu, chosen, impl="triton")[0], want)
    theirs = kk.select_blocks(
        q, kv, config, cu_seqlens_q=cu, stats=kk.kv_block_stats(kv, impl="reference"), impl="reference"
    )
    used = int(chosen.cu_q_blocks[-1])
    same = (chosen.indices[:used, :, :, None] == theirs.indices[:used, :, None]).any(-1)
    shared = (same & (chosen.indices[:used] >= 0)).sum().item() / theirs.counts[:used].sum().item()
    print(f"lists shared with the float32 reference (near-ties differ): {shared:.4f}")
    record.gates["select"] = torch.equal(chosen.counts, theirs.counts) and shared > 0.9
    row = q[-1:]
    want = kk.paged_decode(row.double(), exact, impl="reference")[0]
    record.gates["decode"] = within(kk.paged_decode(row, kv, impl="triton")[0], want)
    chosen = kk.select_blocks(row, kv, config, stats=stats, impl="triton")
    want = kk.block_sparse_decode(row.double(), exact, chosen, impl="reference")[0]
    got = kk.block_sparse_decode(row, kv, chosen, impl="triton")[0]
    record.gates["sparse decode"] = within(got, want)
    record.gates["ceiling"] = record.gates["sdpa"] = True
    print("gates:", record.gates, flush=True)
