"""Statistics of keys per page and per tree node: what selection looks at instead of the keys."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from kvrelay_kernels.checks import check_same, check_shape
from kvrelay_kernels.layout import PagedKV


@dataclass(frozen=True, slots=True, kw_only=True)
class KVBlockStats:
    """Statistics of one layer's post-RoPE keys, addressed by physical page like the keys themselves.

    mean, minimum, maximum: ``[num_blocks, num_kv_heads, head_dim]`` over the 64 keys of a page.
    spread: ``[num_blocks, num_kv_heads]``, root mean square distance of a page's keys from their mean.
    coarse_minimum, coarse_maximum: ``[num_blocks, num_kv_heads, head_dim]``, the one coarser tree node whose
        home (``layout.node_home``) is this page, if any.

    All have the dtype of the keys (minima and maxima are exact). Only complete pages have statistics: the row
    of a page that is partly filled, or of a node whose home is, is unspecified. Rows move, are shared and are
    freed together with their pages.
    """

    mean: Tensor
    minimum: Tensor
    maximum: Tensor
    spread: Tensor
    coarse_minimum: Tensor
    coarse_maximum: Tensor

    @classmethod
    def empty(cls, k_pages: Tensor) -> Self:
        """Uninitialised (NaN) statistics for ``k_pages`` ``[num_blocks, num_kv_heads, 64, head_dim]``."""
        blocks, heads, _, head_dim = k_pages.shape
        vectors = [k_pages.new_full((blocks, heads, head_dim), torch.nan) for _ in range(5)]
        return cls(
            mean=vectors[0],
            minimum=vectors[1],
            maximum=vectors[2],
            spread=k_pages.new_full((blocks, heads), torch.nan),
            coarse_minimum=vectors[3],
            coarse_maximum=vectors[4],
        )

    def check(self, kv: PagedKV) -> None:
        """Raise InvalidArgument unless these statistics belong to pages shaped like those of ``kv``."""
        blocks, heads, _, head_dim = kv.k_pages.shape
        for name in ("mean", "minimum", "maximum", "coarse_minimum", "coarse_maximum"):
            tensor: Tensor = getattr(self, name)
            check_shape(f"stats.{name}", tensor, (blocks, heads, head_dim))
            check_same(f"stats.{name}", tensor, "k_pages", kv.k_pages)
        check_shape("stats.spread", self.spread, (blocks, heads))
        check_same("stats.spread", self.spread, "k_pages", kv.k_pages)
