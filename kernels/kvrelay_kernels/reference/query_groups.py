"""The unit of selection: sibling query blocks that share candidates, and the blocks scored for them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvrelay_kernels.layout import BLOCK_SIZE, num_blocks
from kvrelay_kernels.reference.sequences import Chunk, SequenceView, compute_dtype
from kvrelay_kernels.selection import SelectionConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryGroup:
    """Consecutive query blocks of one sequence, aligned to ``sibling_blocks`` in absolute positions.

    q: ``[rows, num_kv_heads, group, head_dim]`` in the compute dtype, row 0 at ``first_position``.
    frontier: first block of the sibling group. Blocks before it are complete and visible to every row, so
        bounds apply to them; blocks from it on straddle the causal frontier and are always candidates.
    """

    q: Tensor
    first_position: int
    frontier: int
    view: SequenceView

    @property
    def own_blocks(self) -> Tensor:
        """Logical block of each query block, ``[m]``."""
        first = self.first_position // BLOCK_SIZE
        return first + torch.arange(num_blocks(self.q.shape[0]), device=self.q.device)

    def pooled(self) -> Tensor:
        """Mean query of each query block and head, ``[num_kv_heads, m * group, head_dim]``."""
        means = torch.stack([rows.mean(0) for rows in torch.split(self.q, BLOCK_SIZE)])  # [m, H, G, d]
        return means.transpose(0, 1).flatten(1, 2)

    def sampled(self, count: int) -> tuple[Tensor, Tensor]:
        """``count`` evenly spaced rows of each block and head, and their absolute positions.

        Of a block of n rows, head g of G takes rows ``floor((i + (g + 1/2) / G) * n / count)``: the heads
        interleave, so that their average, which is what is ranked, sees ``count * G`` distinct rows.
        Returns ``[num_kv_heads, m * count * group, head_dim]`` and ``[m * count * group]``; rows of a partial
        block that holds fewer repeat.
        """
        num_rows, _, group, _ = self.q.shape
        steps = torch.arange(count, device=self.q.device)[:, None] * 2 * group
        phases = torch.arange(group, device=self.q.device) * 2 + 1
        starts = range(0, num_rows, BLOCK_SIZE)
        lengths = [min(BLOCK_SIZE, num_rows - start) for start in starts]
        picks = torch.stack(
            [
                start + (steps + phases) * n // (2 * group * count)
                for start, n in zip(starts, lengths, strict=True)
            ]
        )  # [m, count, group]
        heads = torch.arange(group, device=self.q.device).expand_as(picks)
        sampled = self.q[picks, :, heads]  # [m, count, group, num_kv_heads, head_dim]
        return sampled.flatten(0, 2).transpose(0, 1), self.first_position + picks.flatten()

    def rows(self, picks: Tensor) -> tuple[Tensor, Tensor]:
        """Rows ``picks [r]`` as ``[num_kv_heads, r * group, head_dim]`` with positions ``[r * group]``."""
        positions = (self.first_position + picks).repeat_interleave(self.q.shape[2])
        return self.q[picks].transpose(0, 1).flatten(1, 2), positions


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredBlocks:
    """What a selector returns: ``blocks [num_kv_heads, n]`` (distinct, -1 none; the forced ones among them)
    and ``scores [num_kv_heads, m, n]``, non-negative shares of attention as the selector estimates them.
    ``ranks``, of the same shape, orders blocks where it is not the scores that do."""

    blocks: Tensor
    scores: Tensor
    ranks: Tensor | None = None


def query_groups(chunk: Chunk, q: Tensor, siblings: int) -> Iterator[QueryGroup]:
    """Split rows ``q [q_len, num_q_heads, head_dim]`` at absolute multiples of ``siblings`` blocks."""
    grouped = q.to(compute_dtype(q.dtype)).reshape(len(q), chunk.view.kv.num_kv_heads, -1, q.shape[2])
    width = siblings * BLOCK_SIZE
    position = chunk.offset
    while position < chunk.view.num_tokens:
        stop = min((position // width + 1) * width, chunk.view.num_tokens)
        yield QueryGroup(
            q=grouped[position - chunk.offset : stop - chunk.offset],
            first_position=position,
            frontier=position // width * siblings,
            view=chunk.view,
        )
        position = stop


def forced_blocks(group: QueryGroup, config: SelectionConfig) -> Tensor:
    """Blocks every sibling may be forced to take, ``[n]`` ascending: sinks, locals, the group's own."""
    last = int(group.own_blocks[-1])
    sinks = torch.arange(min(config.sink_blocks, last + 1), device=group.q.device)
    recent = max(len(sinks), group.frontier - config.local_blocks + 1)
    return torch.cat([sinks, torch.arange(recent, last + 1, device=group.q.device)])


def block_masses(q: Tensor, positions: Tensor, view: SequenceView, blocks: Tensor, scale: float) -> Tensor:
    """Softmax mass of each row on each listed block, normalised over the list.

    q ``[num_kv_heads, r, head_dim]``, positions ``[r]``, blocks ``[num_kv_heads, n]`` (-1: none) give
    ``[num_kv_heads, r, n]``. Streams over 64 blocks at a time.
    """
    slots = torch.arange(BLOCK_SIZE, device=q.device)
    parts = []
    for tile in torch.split(blocks, 64, dim=1):
        logits = q @ view.keys(tile).flatten(1, 2).transpose(-1, -2) * scale
        logits = logits.view(*logits.shape[:2], -1, BLOCK_SIZE)
        key = tile[:, None, :, None] * BLOCK_SIZE + slots
        hidden = (key > positions[None, :, None, None]) | (tile < 0)[:, None, :, None]
        parts.append(logits.masked_fill(hidden, -torch.inf).logsumexp(-1))
    return torch.cat(parts, dim=-1).softmax(-1)


def scored_by_rows(
    blocks: Tensor, masses: Tensor, num_query_blocks: int, config: SelectionConfig
) -> ScoredBlocks:
    """Scores from the masses ``[heads, m * r, n]`` of the rows that rank for each query block."""
    by_block = masses.reshape(masses.shape[0], num_query_blocks, -1, masses.shape[2])
    peaks = by_block.amax(2) if config.by_peak else None
    return ScoredBlocks(blocks=blocks, scores=mean_over_rows(masses, num_query_blocks), ranks=peaks)


def mean_over_rows(masses: Tensor, num_query_blocks: int) -> Tensor:
    """Average ``[heads, m * r, n]`` over the rows of each query block, ``[heads, m, n]``."""
    heads, rows, blocks = masses.shape
    return masses.reshape(heads, num_query_blocks, rows // num_query_blocks, blocks).mean(2)
