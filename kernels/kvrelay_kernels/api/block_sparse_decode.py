"""Operation ``block_sparse_decode``: attention of one query per sequence over its selected blocks."""

from torch import Tensor

from kvrelay_kernels.api.attention import check_sparse, softmax_scale
from kvrelay_kernels.dispatch import implementation
from kvrelay_kernels.layout import PagedKV
from kvrelay_kernels.selection import BlockSelection


def block_sparse_decode(
    q: Tensor,
    kv: PagedKV,
    selection: BlockSelection,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of one query per sequence over its listed KV blocks, and nothing else.

    q: ``[batch, num_q_heads, head_dim]`` floating, dtype and device of the pages, any strides: the last
        token of each sequence.
    kv: paged keys and values, that token included (see ``PagedKV``); empty sequences are allowed.
    selection: lists from ``select_blocks`` without ``cu_seqlens_q``, or of your own.

    scale: multiplies q.k, default ``head_dim ** -0.5``.
    impl: "auto", "reference", "cpu", "cpu-native", "cpu-torch" or "triton".

    Returns ``(out, lse)``: out like q; lse ``[rows, num_q_heads]`` float32 (float64 for float64 q), natural
    log of the sum of ``exp(scale * q.k)``. Rows without keys give 0 and minus infinity. Raises
    InvalidArgument and KernelUnavailable. Method: online softmax (FlashAttention-2, arXiv 2307.08691).
    """
    check_sparse(q, kv, None, selection)
    kernel = implementation("block_sparse_decode", impl, q)
    out, lse = kernel(q, kv, selection, softmax_scale(scale, kv))
    return out, lse
