"""Batched torch ``kv_block_stats``: the reference already is."""

from kvrelay_kernels.reference.kv_block_stats import kv_block_stats

__all__ = ["kv_block_stats"]
