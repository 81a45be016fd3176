"""Batched torch ``merge_attention_states``: the reference already is."""

from kvrelay_kernels.reference.merge_attention_states import merge_attention_states

__all__ = ["merge_attention_states"]
