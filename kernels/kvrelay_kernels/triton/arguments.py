"""What every launch needs of its tensors: dtype support, outputs, strides in the kernels' order."""

import torch
from torch import Tensor

from kvrelay_kernels.errors import KernelUnavailable
from kvrelay_kernels.layout import PagedKV

SUPPORTED = (torch.bfloat16, torch.float16, torch.float32)


def check_supported(operation: str, tensor: Tensor) -> None:
    """Raise KernelUnavailable unless the kernels compute in the tensor's dtype and head_dim."""
    if tensor.dtype not in SUPPORTED:
        raise KernelUnavailable(
            f"{operation}: the triton kernel needs one of {SUPPORTED}, got {tensor.dtype}"
        )
    if tensor.shape[-1] > 256:
        raise KernelUnavailable(
            f"{operation}: the triton kernel needs head_dim <= 256, got {tensor.shape[-1]}"
        )


def empty_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised contiguous ``out`` like ``q`` and ``lse [rows, num_q_heads]`` float32."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)


def paged_arguments(kv: PagedKV) -> tuple[Tensor | int, ...]:
    """k_pages, v_pages, their strides (page, head, token, channel), block_table, its strides, seq_lens."""
    return (
        kv.k_pages,
        kv.v_pages,
        *kv.k_pages.stride(),
        *kv.v_pages.stride(),
        kv.block_table,
        *kv.block_table.stride(),
        kv.seq_lens.contiguous(),
    )
