"""Operation ``merge_attention_states``: joins attention over disjoint sets of keys."""

from torch import Tensor

from kvrelay_kernels.checks import check_floating, check_same, check_shape
from kvrelay_kernels.dispatch import implementation


def merge_attention_states(outs: Tensor, lses: Tensor, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint key sets by log-sum-exp (FlashInfer, arXiv 2501.01005, sec. 2.2).

    outs ``[splits, rows, num_q_heads, head_dim]`` floating, lses ``[splits, rows, num_q_heads]`` float32 or
    float64, natural log; a split without keys has lse minus infinity and its out is ignored. Returns out
    ``[rows, num_q_heads, head_dim]`` and lse ``[rows, num_q_heads]``. Raises InvalidArgument,
    KernelUnavailable.
    """
    check_shape("outs", outs, ("splits", "rows", "num_q_heads", "head_dim"))
    check_shape("lses", lses, tuple(outs.shape[:3]))
    check_floating("outs", outs)
    check_floating("lses", lses)
    check_same("lses", lses, "outs", outs, dtype=False)
    out, lse = implementation("merge_attention_states", impl, outs)(outs, lses)
    return out, lse
