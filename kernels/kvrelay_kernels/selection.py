"""What a selection is and how one is asked for: ``BlockSelection`` and ``SelectionConfig``."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from kvrelay_kernels.checks import check_int32, check_same, check_shape
from kvrelay_kernels.errors import InvalidArgument
from kvrelay_kernels.layout import BLOCK_SIZE, FANOUT, num_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionConfig:
    """How blocks are selected. All counts are in blocks of 64 tokens unless the name says otherwise.

    budget: most blocks a query block attends to, the forced ones included.
    sink_blocks: blocks at the start of the sequence that are always selected.
    local_blocks: most recent blocks that are always selected, the query's own (diagonal) block included.
    top_p: if set, stop adding blocks once those taken hold this share of the estimated attention mass.
    candidate_factor: candidates handed to the exact rerank, as a multiple of the budget (below 1, there is
        room in the lists for all of them).
    beam_factor: nodes kept per tree level, as a multiple of the candidates.
    sampled_queries: rows of a query block and head that rerank the candidates exactly; the heads of a GQA
        group sample different rows.
    by_peak: rank candidates by the largest share that one of these rows gives them, not by the rows' mean;
        ``top_p`` adds up means all the same. For ``tree``, ``two_stage`` and ``oracle``; other selectors have
        no rows.
    sibling_blocks: query blocks that share one candidate list (1 to share none).

    The defaults are the cheapest that reach the bars of ``benchmarks/selection.py`` with a margin.
    """

    budget: int
    selector: str = "tree"
    sink_blocks: int = 1
    local_blocks: int = 2
    top_p: float | None = None
    candidate_factor: float = 2.0
    beam_factor: float = 2.0
    sampled_queries: int = 2
    by_peak: bool = False
    sibling_blocks: int = FANOUT

    def __post_init__(self) -> None:
        if self.sink_blocks < 0:
            raise InvalidArgument("sink_blocks", needed="at least 0", got=self.sink_blocks)
        for name in ("local_blocks", "sampled_queries", "sibling_blocks"):
            if getattr(self, name) < 1:
                raise InvalidArgument(name, needed="at least 1", got=getattr(self, name))
        forced = self.sink_blocks + self.local_blocks
        if self.budget < forced:
            raise InvalidArgument(
                "budget", needed=f"at least sink_blocks + local_blocks ({forced})", got=self.budget
            )
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise InvalidArgument("top_p", needed="None or in (0, 1]", got=self.top_p)
        if self.candidate_factor <= 0.0:
            raise InvalidArgument("candidate_factor", needed="above 0.0", got=self.candidate_factor)
        if self.beam_factor < 1.0:
            raise InvalidArgument("beam_factor", needed="at least 1.0", got=self.beam_factor)

    @property
    def num_candidates(self) -> int:
        """Blocks handed to the exact rerank, besides the forced ones and the sibling group's own."""
        return int(self.candidate_factor * self.budget)

    def unranked(self) -> "SelectionConfig":
        """Settings whose lists, in decode, are all blocks whose keys `tree` and `two_stage` rerank.

        Which these are depends on the queries and the statistics alone, never on a key.
        """
        budget = self.num_candidates + self.sink_blocks + self.local_blocks
        factor = (self.num_candidates + 0.5) / budget  # so that as many candidates come of it
        return replace(self, budget=budget, candidate_factor=factor, top_p=None)

    @property
    def beam(self) -> int:
        """Tree nodes kept per level."""
        return int(self.beam_factor * self.num_candidates)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSelection:
    """Per (query block, KV head), the logical KV blocks to attend to.

    indices: ``[slots, num_kv_heads, budget]`` int32, ascending, then -1. Rows are the query blocks of all
        sequences in order. For prefill ``slots = layout.num_query_block_slots(total_q, batch)``, of which
        ``cu_q_blocks[-1]`` are in use; the rest have count 0. For decode ``slots = batch``.
    counts: ``[slots, num_kv_heads]`` int32, entries of each list.
    cu_q_blocks: ``[batch + 1]`` int32, first row of each sequence.

    The attention kernels read the first ``counts`` entries in any order; the own (diagonal) block is the only
    one that needs a causal mask. Raises InvalidArgument on a bad shape, dtype or device.
    """

    indices: Tensor
    counts: Tensor
    cu_q_blocks: Tensor

    def __post_init__(self) -> None:
        check_shape("indices", self.indices, ("slots", "num_kv_heads", "budget"))
        check_shape("counts", self.counts, tuple(self.indices.shape[:2]))
        check_shape("cu_q_blocks", self.cu_q_blocks, ("batch + 1",))
        for name in ("indices", "counts", "cu_q_blocks"):
            tensor: Tensor = getattr(self, name)
            check_int32(name, tensor)
            check_same(name, tensor, "indices", self.indices)

    def check(self, slots: int, num_kv_heads: int, batch: int) -> None:
        """Raise InvalidArgument unless this selection was made for such a batch."""
        check_shape("selection.indices", self.indices, (slots, num_kv_heads, "budget"))
        check_shape("selection.cu_q_blocks", self.cu_q_blocks, (batch + 1,))

    def attended_pairs(self, q_lens: Tensor, seq_lens: Tensor) -> int:
        """(query, key) pairs attended to, summed over KV heads, counted from the lists themselves.

        q_lens, seq_lens: ``[batch]``. Times the group size, these are the pairs over query heads. Assumes
        what every selector guarantees: a list holds its own block, and none after it.
        """
        total = 0
        for sequence, (q_len, seq_len) in enumerate(zip(q_lens.tolist(), seq_lens.tolist(), strict=True)):
            first, last = self.cu_q_blocks[sequence : sequence + 2].tolist()
            rows = (q_len - torch.arange(last - first) * BLOCK_SIZE).clamp(max=BLOCK_SIZE)
            own = rows * ((seq_len - q_len) % BLOCK_SIZE) + rows * (rows + 1) // 2
            distant = (self.counts[first:last].cpu() - 1) * BLOCK_SIZE * rows[:, None]
            total += int((distant + own[:, None]).sum())
        return total

    def to_block_mask(self, sequence: int, num_q_heads: int, q_len: int, seq_len: int) -> BlockMask:
        """FlexAttention mask of one sequence: ``[1, num_q_heads, q_len, seq_len]``, blocks of 64.

        Every listed block is partial under a causal ``mask_mod``. The lists stay ``budget`` wide, never a
        row of all blocks, so ``BlockMask.to_dense`` does not apply, and ``flex_attention`` must be compiled
        to profit (eager, it evaluates ``mask_mod`` alone). On a CPU, whose compiled kernel wants a row of all
        blocks, they are padded to that. Forward only.
        """
        first, last = self.cu_q_blocks[sequence : sequence + 2].tolist()
        group = num_q_heads // self.indices.shape[1]
        counts = self.counts[first:last].T.repeat_interleave(group, 0)[None]
        indices = self.indices[first:last].clamp(min=0).transpose(0, 1).repeat_interleave(group, 0)[None]
        if not indices.is_cuda:
            missing = num_blocks(seq_len) - indices.shape[-1]
            indices = torch.nn.functional.pad(indices, (0, max(missing, 0)))
        offset = seq_len - q_len

        def causal(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return key <= query + offset

        return BlockMask.from_kv_blocks(
            counts.contiguous(),
            indices.contiguous(),
            BLOCK_SIZE=BLOCK_SIZE,
            mask_mod=causal,
            seq_lengths=(q_len, seq_len),
            compute_q_blocks=False,
        )
