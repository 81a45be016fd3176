"""Device functions under the attention kernels: find the sequence, load a tile, one online-softmax step.

Scores live in base 2 (``exp2``): ``scale_log2`` is ``scale * log2(e)``. ``peak`` starts at a finite floor, so
rows without keys never meet infinity minus infinity; they end with ``total == 0``.
"""

import triton
import triton.language as tl

FLOOR = tl.constexpr(-1.0e30)
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def find_sequence(bounds_ptr, item, batch, BATCH_POW2: tl.constexpr):
    """Sequence that owns ``item`` of ``bounds [batch + 1]``; ``batch`` if the item is past the end."""
    index = tl.arange(0, BATCH_POW2)
    bounds = tl.load(bounds_ptr + index, mask=index <= batch, other=2147483647)
    return tl.sum((bounds <= item).to(tl.int32), 0) - 1


@triton.jit
def load_rows(base, stride_row, stride_dim, row_mask, ROWS: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr):
    """``[ROWS, D]`` from ``base``; zero where ``row_mask [ROWS]`` is false and past ``DIM`` channels."""
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, D)
    pointers = base + row[:, None] * stride_row + dim[None, :] * stride_dim
    if D == DIM:
        mask = row_mask[:, None]
    else:
        mask = row_mask[:, None] & (dim < DIM)[None, :]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def load_page(base, stride_row, stride_dim, taken, D: tl.constexpr, DIM: tl.constexpr):
    """A whole page ``[64, D]``, or zeros unless ``taken`` (a scalar)."""
    row = tl.arange(0, 64)
    dim = tl.arange(0, D)
    pointers = base + row[:, None] * stride_row + dim[None, :] * stride_dim
    mask = row[:, None] < tl.where(taken, 64, 0)
    if D != DIM:
        mask = mask & (dim < DIM)[None, :]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def step_whole(q, k, v, acc, peak, total, scale_log2, taken):
    """Online softmax over a tile that every row sees; without effect unless ``taken`` (a scalar).

    A tile that is not taken holds zeros; shifting its exponents by infinity makes its weights zero, at the
    price of two operations per row and none per score.
    """
    logits = tl.dot(q, tl.trans(k), input_precision="ieee")
    new_peak = tl.maximum(peak, tl.where(taken, tl.max(logits, 1) * scale_log2, FLOOR))
    shift = tl.where(taken, new_peak, float("inf"))
    weights = tl.math.exp2(logits * scale_log2 - shift[:, None])
    decay = tl.math.exp2(peak - new_peak)
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, new_peak, total


@triton.jit
def step_masked(q, k, v, acc, peak, total, scale_log2, visible):
    """Online softmax over a tile of which each row sees the keys in ``visible [rows, 64]``."""
    logits = tl.dot(q, tl.trans(k), input_precision="ieee")
    logits = tl.where(visible, logits * scale_log2, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(logits, 1))
    weights = tl.math.exp2(logits - new_peak[:, None])
    decay = tl.math.exp2(peak - new_peak)
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, new_peak, total


@triton.jit
def finish(acc, peak, total):
    """``(out, lse)`` of finished rows; 0 and minus infinity for rows that saw no key. Natural log."""
    seen = total > 0
    out = acc * tl.where(seen, 1.0 / tl.where(seen, total, 1.0), 0.0)[:, None]
    lse = tl.where(seen, (peak + tl.math.log2(tl.where(seen, total, 1.0))) * LN2, float("-inf"))
    return out, lse


@triton.jit
def store_rows(out_ptr, lse_ptr, out, lse, row, row_mask, D: tl.constexpr, DIM: tl.constexpr):
    """Store ``out [rows, D]`` and ``lse [rows]`` at flat rows ``row`` (int64) of contiguous outputs."""
    dim = tl.arange(0, D)
    pointers = out_ptr + row[:, None] * DIM + dim[None, :]
    tl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & (dim < DIM)[None, :])
    tl.store(lse_ptr + row, lse, mask=row_mask)
