"""Triton selectors ``tree`` and ``two_stage``; see ``reference.select_blocks_tree``.

``tree_descent`` names candidates, ``tree_rerank`` scores them exactly and writes the lists. Their programs
are persistent, with scratch of their own, which does not grow with n.
"""

import torch

from kvrelay_kernels.triton.select_request import SelectRequest
from kvrelay_kernels.triton.tree_descent import launch_descent
from kvrelay_kernels.triton.tree_rerank import launch_rerank


def tree(request: SelectRequest) -> None:
    """Beam search down the tree, then the rerank."""
    _select(request, descend=True)


def two_stage(request: SelectRequest) -> None:
    """Bounds of every page, then the rerank."""
    _select(request, descend=False)


def _select(request: SelectRequest, *, descend: bool) -> None:
    bounds, groups = request.groups(request.siblings)
    work = groups * request.kv.num_kv_heads
    if work:
        candidates = torch.empty(
            (work, request.config.num_candidates), dtype=torch.int32, device=request.q.device
        )
        counts = torch.empty((work,), dtype=torch.int32, device=request.q.device)
        launch_descent(request, bounds, candidates, counts, descend=descend)
        launch_rerank(request, bounds, candidates, counts)
