"""Sparse long-context attention over a paged KV cache: select blocks, attend to them, know what it cost.

Usable without the engine. Importing this imports torch, and neither triton nor transformers.
"""

from kvrelay_kernels.api.attend import Attended, AttendPolicy, attend, measure_crossover
from kvrelay_kernels.api.attention_cost import AttentionCost, AttentionShape, attention_cost
from kvrelay_kernels.api.block_sparse_decode import block_sparse_decode
from kvrelay_kernels.api.block_sparse_prefill import block_sparse_prefill
from kvrelay_kernels.api.kv_block_stats import kv_block_stats
from kvrelay_kernels.api.merge_attention_states import merge_attention_states
from kvrelay_kernels.api.paged_decode import paged_decode
from kvrelay_kernels.api.paged_prefill import paged_prefill
from kvrelay_kernels.api.select_blocks import select_blocks
from kvrelay_kernels.api.sparse_prefill import sparse_prefill
from kvrelay_kernels.api.update_kv_block_stats import update_kv_block_stats
from kvrelay_kernels.cpu import cpu_backend
from kvrelay_kernels.dispatch import chosen_implementation
from kvrelay_kernels.errors import InvalidArgument, KernelError, KernelUnavailable, UnknownName
from kvrelay_kernels.layout import BLOCK_SIZE, PagedKV
from kvrelay_kernels.selection import BlockSelection, SelectionConfig
from kvrelay_kernels.selectors import SELECTORS
from kvrelay_kernels.stats import KVBlockStats

__all__ = [
    "BLOCK_SIZE",
    "SELECTORS",
    "AttendPolicy",
    "Attended",
    "AttentionCost",
    "AttentionShape",
    "BlockSelection",
    "InvalidArgument",
    "KVBlockStats",
    "KernelError",
    "KernelUnavailable",
    "PagedKV",
    "SelectionConfig",
    "UnknownName",
    "attend",
    "attention_cost",
    "block_sparse_decode",
    "block_sparse_prefill",
    "chosen_implementation",
    "cpu_backend",
    "kv_block_stats",
    "measure_crossover",
    "merge_attention_states",
    "paged_decode",
    "paged_prefill",
    "select_blocks",
    "sparse_prefill",
    "update_kv_block_stats",
]
