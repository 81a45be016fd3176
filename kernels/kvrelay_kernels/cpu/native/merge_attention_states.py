"""C++ ``merge_attention_states``: ``csrc/merge.h``."""

import torch
from torch import Tensor

from kvrelay_kernels.cpu.native.library import DTYPES, library


def merge_attention_states(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """See ``kvrelay_kernels.api.merge_attention_states``."""
    splits, rows, num_q_heads, head_dim = outs.shape
    outs, lses32 = outs.contiguous(), lses.float().contiguous()
    out, lse = torch.empty_like(outs[0]), torch.empty_like(lses32[0])
    library().kvr_merge(
        outs.data_ptr(),
        lses32.data_ptr(),
        splits,
        rows * num_q_heads,
        head_dim,
        DTYPES[outs.dtype],
        torch.get_num_threads(),
        out.data_ptr(),
        lse.data_ptr(),
    )
    return out, lse.to(lses.dtype)
