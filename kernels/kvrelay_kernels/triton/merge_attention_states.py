"""Triton kernel of ``merge_attention_states``: log-sum-exp merge (FlashInfer, arXiv 2501.01005, sec. 2.2)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvrelay_kernels.triton.arguments import check_supported
from kvrelay_kernels.triton.tiles import FLOOR, LN2, LOG2E
from kvrelay_kernels.triton.tuning import padded_head_dim


def merge_attention_states(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """See ``kvrelay_kernels.api.merge_attention_states``."""
    check_supported("merge_attention_states", outs)
    check_supported("merge_attention_states", lses[..., None])
    out = torch.empty(outs.shape[1:], dtype=outs.dtype, device=outs.device)
    lse = torch.empty(lses.shape[1:], dtype=lses.dtype, device=lses.device)
    merge_into(outs, lses, out, lse)
    return out, lse


def merge_into(outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor) -> None:
    """Merge ``outs [splits, rows, heads, dim]`` into contiguous ``out`` and ``lse``."""
    splits, rows, heads, head_dim = outs.shape
    if not rows * heads * head_dim:
        return
    _merge[(rows * heads,)](
        outs,
        *outs.stride(),
        lses,
        *lses.stride(),
        out,
        lse,
        splits,
        heads,
        DIM=head_dim,
        D=padded_head_dim(head_dim),
        SPLITS=16,
        num_warps=4,
    )


@triton.jit
def _merge(
    outs_ptr, out_split, out_row, out_head, out_dim, lses_ptr, lse_split, lse_row, lse_head,
    merged_ptr, merged_lse_ptr, splits, heads,
    DIM: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = program // heads
    head = program % heads
    dim = tl.arange(0, D)
    outs = outs_ptr + row * out_row + head * out_head
    lses = lses_ptr + row * lse_row + head * lse_head
    acc = tl.zeros([D], dtype=tl.float32)
    peak = FLOOR
    total = 0.0
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        lse = tl.load(lses + split * lse_split, mask=split < splits, other=float("-inf")).to(tl.float32)
        lse = lse * LOG2E
        new_peak = tl.maximum(peak, tl.max(lse, 0))
        weights = tl.math.exp2(lse - new_peak)
        seen = lse > float("-inf")  # the out of a split without keys may hold NaN
        parts = tl.load(
            outs + split.to(tl.int64)[:, None] * out_split + dim[None, :] * out_dim,
            mask=seen[:, None] & (dim < DIM)[None, :],
            other=0.0,
        ).to(tl.float32)
        decay = tl.math.exp2(peak - new_peak)
        acc = acc * decay + tl.sum(parts * weights[:, None], 0)
        total = total * decay + tl.sum(weights, 0)
        peak = new_peak
    merged = acc * tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)
    merged_lse = tl.where(
        total > 0, (peak + tl.math.log2(tl.where(total > 0, total, 1.0))) * LN2, float("-inf")
    )
    tl.store(merged_ptr + program * DIM + dim, merged.to(merged_ptr.dtype.element_ty), mask=dim < DIM)
    tl.store(merged_lse_ptr + program, merged_lse.to(merged_lse_ptr.dtype.element_ty))
