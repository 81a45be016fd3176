"""What the sparse kernels are timed beside: SDPA's backends, and other libraries where they are installed.

A peer that cannot run here is recorded as absent, with the reason. Knows how each is called; knows nothing of
our timings.
"""

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import kvrelay_kernels as kk
from gpu_run import Record, Setting, attempt, chunk, contiguous, make_cache, make_queries, milliseconds

NSA_GROUP = 16
"""Query heads per KV head that flash-linear-attention's NSA needs at least, a power of 2."""


def sdpa(backend: SDPBackend, q: Tensor, kv: kk.PagedKV) -> Callable[[], Tensor]:
    """Causal SDPA of whole-sequence ``q [tokens, heads, dim]`` by ``backend``; heads expanded beforehand."""
    keys, values = (t.repeat_interleave(q.shape[1] // kv.num_kv_heads, 1) for t in contiguous(kv))
    queries = q.transpose(0, 1)[None].contiguous()

    def run() -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)

    return run


def flex_attention(q: Tensor, kv: kk.PagedKV, selection: kk.BlockSelection) -> Callable[[], object]:
    """FlexAttention over our own lists; compiled on a GPU, where it profits from them."""
    from torch.nn.attention.flex_attention import flex_attention as flex

    tokens = q.shape[0]
    mask = selection.to_block_mask(0, q.shape[1], tokens, tokens)
    run = torch.compile(flex, dynamic=False) if q.is_cuda else flex
    keys, values = contiguous(kv)
    queries = q.transpose(0, 1)[None].contiguous()
    return lambda: run(queries, keys, values, block_mask=mask, enable_gqa=True)


def flashinfer(q: Tensor, kv: kk.PagedKV, selection: kk.BlockSelection) -> Callable[[], object]:
    """FlashInfer's dense causal prefill of one request."""
    library = import_module("flashinfer")
    keys, values = (t[0].transpose(0, 1).contiguous() for t in contiguous(kv))
    return lambda: library.single_prefill_with_kv_cache(q, keys, values, causal=True)


def moba(q: Tensor, kv: kk.PagedKV, selection: kk.BlockSelection) -> Callable[[], object]:
    """MoBA of flash-linear-attention (arXiv 2502.13189): as many keys a query, in blocks of 512."""
    library = import_module("fla.ops.moba")
    keys, values = (t[0].transpose(0, 1).contiguous() for t in contiguous(kv))
    group = q.shape[1] // kv.num_kv_heads
    keys, values = (t.repeat_interleave(group, 1) for t in (keys, values))
    cu = torch.tensor([0, q.shape[0]], dtype=torch.int32, device=q.device)
    top = max(1, selection.indices.shape[2] * kk.BLOCK_SIZE // 512)
    return lambda: library.parallel_moba(q, keys, values, cu, q.shape[0], 512, top)


def nsa(q: Tensor, kv: kk.PagedKV, selection: kk.BlockSelection) -> Callable[[], object]:
    """NSA of flash-linear-attention (arXiv 2502.11089): its selected branch, over our lists.

    It needs ``NSA_GROUP`` query heads per KV head: where there are fewer, KV heads are left out.
    """
    library = import_module("fla.ops.nsa.parallel")
    heads = max(1, q.shape[1] // max(NSA_GROUP, q.shape[1] // kv.num_kv_heads))
    keys, values = (t[:, :heads].transpose(1, 2).contiguous() for t in contiguous(kv))
    blocks = selection.indices[: -(-q.shape[0] // kk.BLOCK_SIZE), :heads].clamp(min=0).long()
    lists = blocks.repeat_interleave(kk.BLOCK_SIZE, 0)[None, : q.shape[0]].contiguous()
    counts = selection.counts[: len(blocks), :heads].long().repeat_interleave(kk.BLOCK_SIZE, 0)[None]
    ones = q.new_ones(1, *q.shape[:2])
    return lambda: library.parallel_nsa(
        q[None], keys, values, g_slc=ones, block_indices=lists, block_counts=counts[:, : q.shape[0]]
    )


PEERS = {"flex_attention": flex_attention, "flashinfer": flashinfer, "fla_moba": moba, "fla_nsa": nsa}


def measure_peers(tokens: int, budget: int, setting: Setting, record: Record) -> None:
    """Time every peer on the same queries, keys and, where it takes some, lists; say which are absent."""
    kv, q, cu = make_cache([tokens], setting), make_queries(tokens, setting), chunk(tokens, setting)
    stats = kk.kv_block_stats(kv, impl="triton")
    config = kk.SelectionConfig(budget=budget)
    chosen = kk.select_blocks(q, kv, config, cu_seqlens_q=cu, stats=stats, impl="triton")
    for name, prepare in PEERS.items():
        try:
            run = prepare(q, kv, chosen)
        except ImportError as error:
            record.absent[name] = str(error)
            print(f"peer {name}: absent, {error}", flush=True)
            continue
        ms = attempt(f"peer {name} {tokens}", record, lambda run=run: milliseconds(run, setting))
        if ms is not None:
            record.add("peer", "sdpa", peer=name, tokens=tokens, budget_keys=64 * budget, ms=ms)
