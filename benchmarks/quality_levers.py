"""What each choice in sparse attention is worth, by exact scores and plain torch: no kernel is involved.

    python benchmarks/quality_levers.py [TEXT] [--only NAME ...]

A text of 6,144 tokens is prefilled densely; its last 512 tokens are run again, sparse in one way after the
other, over the dense keys before them, and compared with dense. A line takes half a minute on one core.
"""

import argparse
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from captured_attention import load_layers, token_ids
from kvrelay.config import cache_home
from kvrelay.models.decoder import Decoder
from kvrelay.models.hub import resolve
from quality import compare
from quality_tasks import TEXTS
from record import write_record

NUM_TOKENS, NUM_SPARSE, TILE_ROWS, BLOCK = 6144, 512, 256, 64
NEVER, ALWAYS = -1.0, 2.0  # below and above every share of attention


@dataclass(frozen=True, slots=True, kw_only=True)
class Lever:
    """One way to choose. Blocks are of `key_block` keys; counts of blocks are in units of 64 keys.

    queries, per_head: who shares a list: so many queries, and the heads of a group unless `per_head`.
    sampled: rows of 64 that rank, the heads interleaved; None is all of them.
    by_peak: lists are ranked by the largest share that one of these gives a block, not by their mean.
    across_heads: the budget is that of a layer's lists on average; blocks compete over all of them.
    top_p: stop once this share is held. tail: unselected blocks still give their mean value, weighted by
    their exact mass; no estimate of that tail can do better.
    """

    budget: int = 16
    local: int = 2
    queries: int = 64
    per_head: bool = False
    sampled: int | None = None
    by_peak: bool = False
    across_heads: bool = False
    top_p: float | None = None
    key_block: int = 64
    dense_layers: tuple[int, ...] = (0, 1)
    tail: bool = False


LEVERS = {
    "8 local blocks": Lever(local=8),
    "2 local blocks (all below too)": Lever(),
    "ranked by 2 rows of 64": Lever(sampled=2),
    "ranked by 8 rows": Lever(sampled=8),
    "unselected blocks as exact mass times mean value": Lever(tail=True),
    "a list for 16 queries": Lever(queries=16),
    "a list for each head": Lever(per_head=True),
    "a list for 16 queries of each head": Lever(queries=16, per_head=True),
    "a list for each query of each head": Lever(queries=1, per_head=True),
    "blocks of 16 keys": Lever(key_block=16),
    "top_p 0.95": Lever(top_p=0.95, budget=96),
    "a list for each head, no dense layers": Lever(per_head=True, dense_layers=()),
    "the same, ranked by the largest share": Lever(per_head=True, dense_layers=(), by_peak=True),
    "the same, heads share a budget": Lever(per_head=True, dense_layers=(), across_heads=True),
    "the same, both": Lever(per_head=True, dense_layers=(), by_peak=True, across_heads=True),
    "the same, top_p 0.95": Lever(per_head=True, dense_layers=(), top_p=0.95, budget=96),
    "top_p 0.96, a list for each head": Lever(top_p=0.96, budget=96, per_head=True),
    "the same, no dense layers": Lever(top_p=0.96, budget=96, per_head=True, dense_layers=()),
    "the same, ranked by 8 rows": Lever(top_p=0.96, budget=96, per_head=True, dense_layers=(), sampled=8),
    "only layers 0 and 1 sparse": Lever(dense_layers=tuple(range(2, 30))),
}


@dataclass
class Attention:
    """`attend` over `kv`, keys and values `[NUM_TOKENS, num_kv_heads, head_dim]` of each layer."""

    kv: list[tuple[Tensor, Tensor]]
    start: int
    lever: Lever | None
    blocks: list[float] = field(default_factory=list)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q and out `[T, num_q_heads, head_dim]`."""
        keys, values = self.kv[layer]
        keys[self.start : self.start + len(q)], values[self.start : self.start + len(q)] = k, v
        lever = None if self.lever is None or layer in self.lever.dense_layers else self.lever
        tiles = enumerate(q.split(TILE_ROWS))
        return torch.cat([self._tile(rows, self.start + i * TILE_ROWS, layer, lever) for i, rows in tiles])

    def _tile(self, q: Tensor, first: int, layer: int, lever: Lever | None) -> Tensor:
        keys, values = (x[: first + len(q)].transpose(0, 1)[:, None] for x in self.kv[layer])
        grouped = q.unflatten(1, (keys.shape[0], -1)).permute(1, 2, 0, 3)  # [H, G, rows, d]
        logits = grouped @ keys.mT * q.shape[2] ** -0.5
        weights = logits.masked_fill_(_later(len(q), first), -torch.inf).softmax(-1)
        if lever is not None:
            kept = chosen(weights, first, lever)
            self.blocks.append(kept.sum(-1).double().mean().item() * lever.key_block / BLOCK)
            weights = with_tail(weights, kept, lever)
        return (weights @ values).permute(2, 0, 1, 3).reshape(q.shape)


def chosen(weights: Tensor, first: int, lever: Lever) -> Tensor:
    """Blocks that each row reads, bool `[H, G, rows, n / key_block]`, by dense weights `[H, G, rows, n]`."""
    mass = weights.unflatten(-1, (-1, lever.key_block)).sum(-1)
    heads, group, rows, count = mass.shape
    shared = ranking(mass, lever)  # [H, G or 1, lists, count]
    per_block = BLOCK // lever.key_block
    own = (first + torch.arange(shared.shape[2]) * (rows // shared.shape[2])) // BLOCK
    block = torch.arange(count) // per_block
    visible = block <= own[:, None]
    forced = visible & ((block < 1) | (block > own[:, None] - lever.local))
    rank = shared.masked_fill(forced, ALWAYS).masked_fill(~visible, NEVER)
    order = rank.argsort(dim=-1, descending=True, stable=True)[..., : lever.budget * per_block]
    held = shared.masked_fill(~visible, 0.0).gather(-1, order)
    wanted = torch.ones_like(order, dtype=torch.bool)
    if lever.top_p is not None:
        wanted = held.cumsum(-1) - held < lever.top_p
    lists = torch.zeros_like(rank, dtype=torch.bool).scatter_(-1, order, wanted) | forced
    if lever.across_heads:
        every = rank.permute(2, 0, 1, 3).flatten(1)  # [lists, H * G * count]
        together = min(lever.budget * per_block * heads * shared.shape[1], every.shape[1])
        lists = rank >= every.topk(together).values[:, -1:]
    lists = (lists & visible).repeat_interleave(rows // shared.shape[2], 2)
    return lists.expand(heads, group, rows, count)


def ranking(mass: Tensor, lever: Lever) -> Tensor:
    """Mean mass, or the largest, of the rows that share a list, `[H, G or 1, lists, blocks]`."""
    group = mass.shape[1]
    tiles = mass.unflatten(2, (-1, BLOCK if lever.sampled else lever.queries))
    if lever.sampled is None:
        shared = tiles.amax(3) if lever.by_peak else tiles.mean(3)
    else:
        step = BLOCK / lever.sampled
        picks = [[int((i + (g + 0.5) / group) * step) for i in range(lever.sampled)] for g in range(group)]
        shared = torch.stack([tiles[:, g, :, picks[g]].mean(2) for g in range(group)], 1)
    return shared if lever.per_head else shared.mean(1, keepdim=True)


def with_tail(weights: Tensor, kept: Tensor, lever: Lever) -> Tensor:
    """Weights of the kept blocks, those of the others spread evenly over their keys or gone; normalised."""
    blocks = weights.unflatten(-1, (-1, lever.key_block))
    others = blocks.mean(-1, keepdim=True) if lever.tail else torch.zeros(())
    mixed = torch.where(kept[..., None], blocks, others).flatten(-2)
    return mixed / mixed.sum(-1, keepdim=True)


def _later(num_rows: int, first: int) -> Tensor:
    """Keys after each row, bool `[rows, n]`."""
    return torch.ones(num_rows, first + num_rows, dtype=torch.bool).triu(first + 1)


@torch.inference_mode()
def forward(
    model: Decoder, ids: Tensor, kv: list[tuple[Tensor, Tensor]], start: int, lever: Lever | None
) -> tuple[Tensor, float]:
    """Logits of the last tokens, and the blocks of 64 that a row of a sparse layer reads on average."""
    attention = Attention(kv, start, lever)
    hidden = model.forward(ids[start:], torch.arange(start, len(ids)), attention)
    logits = torch.cat([model.logits(rows) for rows in hidden[-NUM_SPARSE:].split(128)])
    return logits, sum(attention.blocks) / max(1, len(attention.blocks))


def row(logits: Tensor, dense: Tensor, targets: Tensor) -> dict[str, float]:
    """Share of tokens with dense's top choice, KL in nats, perplexity over dense's."""
    own, best = compare(logits, dense, targets), compare(dense, dense, targets)
    return {"top1": own["top1"], "kl": own["kl"], "ppl_ratio": math.exp(own["nll"] - best["nll"])}


def main() -> None:
    """Dense once, then every lever; prints a table and writes the record unless `--only` was given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", nargs="?", type=Path, default=TEXTS / "python_source.txt")
    parser.add_argument("--only", nargs="+", choices=LEVERS, metavar="NAME")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    directory = resolve("smollm2-135m-instruct", cache_home())
    model, tokens = load_layers(directory, None), token_ids(directory, arguments.text, NUM_TOKENS + 1)
    shape = (NUM_TOKENS, model.spec.num_kv_heads, model.spec.head_dim)
    kv = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(model.spec.num_layers)]
    dense, _ = forward(model, tokens[:-1], kv, 0, None)

    def measured(lever: Lever) -> dict[str, float]:
        fresh = [(k.clone(), v.clone()) for k, v in kv]
        logits, blocks = forward(model, tokens[:-1], fresh, NUM_TOKENS - NUM_SPARSE, lever)
        return row(logits, dense, tokens[-NUM_SPARSE:]) | {"blocks": blocks}

    rows = {}
    for name in arguments.only or LEVERS:
        rows[name] = measured(LEVERS[name])
        print(f"| {name} | {' | '.join(f'{value:.4g}' for value in rows[name].values())} |", flush=True)
    same = measured(Lever(budget=NUM_TOKENS // BLOCK))["kl"] < 1e-4
    write_record(
        "quality_levers",
        settings={"text": arguments.text.name, "num_tokens": NUM_TOKENS, "num_sparse": NUM_SPARSE},
        gate={"passed": same, "checks": {"a budget that holds everything is dense": same}},
        results=rows,
        keep=arguments.only is None,
    )


if __name__ == "__main__":
    main()
