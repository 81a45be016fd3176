"""Batched torch ``select_blocks``: the reference already is."""

from kvrelay_kernels.reference.select_blocks import select_blocks

__all__ = ["select_blocks"]
