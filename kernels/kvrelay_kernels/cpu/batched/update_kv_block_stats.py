"""Batched torch ``update_kv_block_stats``: the reference already is."""

from kvrelay_kernels.reference.update_kv_block_stats import update_kv_block_stats

__all__ = ["update_kv_block_stats"]
