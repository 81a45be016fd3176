"""Operation ``block_sparse_prefill``: causal attention of a chunk over its selected blocks."""

from torch import Tensor

from kvrelay_kernels.api.attention import check_sparse, softmax_scale
from kvrelay_kernels.dispatch import implementation
from kvrelay_kernels.layout import PagedKV
from kvrelay_kernels.selection import BlockSelection


def block_sparse_prefill(
    q: Tensor,
    kv: PagedKV,
    cu_seqlens_q: Tensor,
    selection: BlockSelection,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Causal attention of each 64-row query block over its listed KV blocks, and nothing else.

    q: ``[total_q, num_q_heads, head_dim]`` floating, dtype and device of the pages, any strides; sequence b
        owns rows ``cu_seqlens_q[b]:cu_seqlens_q[b + 1]``, which are the last tokens of its cache.
    kv: paged keys and values, the chunk included (see ``PagedKV``).
    cu_seqlens_q: ``[batch + 1]`` int32; empty chunks are allowed.
        Chunk offsets (seq_len - q_len) must be multiples of 64; checked where lengths are on the host.
    selection: lists from ``select_blocks`` or of your own; order within a list does not matter.

    scale: multiplies q.k, default ``head_dim ** -0.5``.
    impl: "auto", "reference", "cpu", "cpu-native", "cpu-torch" or "triton".

    Returns ``(out, lse)``: out like q; lse ``[rows, num_q_heads]`` float32 (float64 for float64 q), natural
    log of the sum of ``exp(scale * q.k)``. Rows without keys give 0 and minus infinity. Raises
    InvalidArgument and KernelUnavailable. Method: online softmax (FlashAttention-2, arXiv 2307.08691).
    """
    check_sparse(q, kv, cu_seqlens_q, selection)
    kernel = implementation("block_sparse_prefill", impl, q)
    out, lse = kernel(q, kv, cu_seqlens_q, selection, softmax_scale(scale, kv))
    return out, lse
