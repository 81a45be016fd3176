"""Reference of ``merge_attention_states``."""

import torch
from torch import Tensor

from kvrelay_kernels.reference.sequences import compute_dtype


def merge_attention_states(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """See ``kvrelay_kernels.api.merge_attention_states``."""
    lse = lses.logsumexp(0)
    weights = (lses - lse).exp().masked_fill(lses == -torch.inf, 0.0)
    # rows empty in every split: -inf - -inf is NaN, and masked above
    parts = outs.to(compute_dtype(outs.dtype)).masked_fill((weights == 0)[..., None], 0.0)
    return (parts * weights[..., None]).sum(0).to(outs.dtype), lse
