"""Prefill seconds and decode tokens/s of long contexts, dense against sparse, and attention's share of them.

    python benchmarks/long_context.py                    # 4K to 128K, minutes
    python benchmarks/long_context.py --lengths 4096,8192
    python benchmarks/long_context.py --exact --no-record    # a list for each head, ranked by every query

A whole dense prefill of 128K tokens takes a CPU hours, so chunks are timed where they stand: one chunk of
rows after 0, …, n tokens of (random) KV, through the engine's own layers and attention, dense and sparse
layers in the same pass. A prefill is the sum over its chunks, interpolated between those positions (a dense
chunk's cost is linear in its position). Layers have one shape: a few are timed, and counted as often as the
model has them. The gate runs one whole prefill of the shortest length beside the sum of its chunks;
`--whole N` runs prefills of N tokens from end to end besides, dense and sparse, of the timed layers alone.
Quality is not looked at here.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import torch

from kvrelay.attention import PagedAttention, Span
from kvrelay.cache.memory import memory_bytes
from kvrelay.cache.store import KVStore
from kvrelay.config import cache_home
from kvrelay.models.decoder import Decoder
from kvrelay.models.loading import load_model
from kvrelay.models.native import NativeDecoder
from kvrelay.sparse import SparseAttention
from kvrelay.types import KVLayout, num_blocks
from record import write_record

TIMED_LAYERS = 3  # the first is dense in both settings, the others are not
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Seconds of a chunk (or decode step): one dense layer's attention, one sparse layer's, all the rest."""

    dense_layer_s: float
    sparse_layer_s: float
    rest_s: float

    def total_s(self, num_layers: int, num_dense_layers: int) -> float:
        """The whole model: every layer's attention, and the rest, which was timed for all layers together."""
        return self.rest_s + self.attention_s(num_layers, num_dense_layers)

    def attention_s(self, num_layers: int, num_dense_layers: int) -> float:
        """Attention of the whole model."""
        return num_dense_layers * self.dense_layer_s + (num_layers - num_dense_layers) * self.sparse_layer_s


class Bench:
    """A model cut to `TIMED_LAYERS` over random KV of the longest length."""

    def __init__(
        self, model: Decoder | NativeDecoder, sparse: SparseAttention, num_tokens: int, repeats: int
    ) -> None:
        self.num_layers, self.num_dense_layers = model.spec.num_layers, len(sparse.dense_layers)
        self._model, self._repeats = cut(model), repeats
        self.sparse = first_layer_dense(sparse)
        layout = KVLayout(
            model="",
            dtype=str(model.dtype).removeprefix("torch."),
            num_layers=TIMED_LAYERS,
            num_kv_heads=model.spec.num_kv_heads,
            head_dim=model.spec.head_dim,
        )
        count = num_blocks(num_tokens)
        memory = memoryview(bytearray(memory_bytes(layout, count, keeps_stats=True)))
        self._store = KVStore(layout, count, memory, model.device, keeps_stats=True)
        self._store.pages.normal_(generator=torch.Generator().manual_seed(0))
        self._store.refresh_stats(range(count), num_tokens)

    def step(self, end: int, num_rows: int) -> Step:
        """The last `num_rows` of `end` tokens: medians, dense and sparse alternating."""
        return _medians([self._once(end, num_rows) for _ in range(self._repeats + 1)][1:])

    @torch.inference_mode()
    def whole(self, num_tokens: int, chunk: int, sparse: SparseAttention | None) -> float:
        """Seconds of a whole prefill of the cut model."""
        start_s = time.perf_counter()
        for start in range(0, num_tokens, chunk):
            self._forward(start, min(start + chunk, num_tokens), sparse)
        return time.perf_counter() - start_s

    @torch.inference_mode()
    def _once(self, end: int, num_rows: int) -> Step:
        by_layer, rest = self._forward(end - num_rows, end, self.sparse)
        scaled = rest * self.num_layers / TIMED_LAYERS  # embedding and the last norm are next to nothing
        return Step(dense_layer_s=by_layer[0], sparse_layer_s=median(by_layer[1:]), rest_s=scaled)

    def _forward(self, start: int, end: int, sparse: SparseAttention | None) -> tuple[list[float], float]:
        """Seconds of each layer's attention, and of everything else."""
        is_decode = end - start == 1
        span = Span(start, end - start, range(num_blocks(end)), sparse, start if is_decode else end)
        attend, spent = PagedAttention(self._store, [span]), list[float]()
        begin_s = time.perf_counter()
        self._model.forward(torch.zeros(end - start).long(), torch.arange(start, end), _timed(attend, spent))
        return spent, time.perf_counter() - begin_s - sum(spent)


def _timed(attend: PagedAttention, spent: list[float]) -> Callable[..., torch.Tensor]:
    def timed(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        start_s = time.perf_counter()
        out = attend(layer, q, k, v)
        spent.append(time.perf_counter() - start_s)
        return out

    return timed


def cut(model: Decoder | NativeDecoder) -> Decoder | NativeDecoder:
    """The model's first `TIMED_LAYERS` layers."""
    if isinstance(model, NativeDecoder):
        return replace(model, spec=replace(model.spec, num_layers=TIMED_LAYERS))
    return replace(model, layers=model.layers[:TIMED_LAYERS])


def first_layer_dense(sparse: SparseAttention) -> SparseAttention:
    """The settings with only the first timed layer dense, and the others sparse from the budget on."""
    return msgspec.structs.replace(sparse, dense_layers=(0,), dense_below_tokens=0)


def prefill_row(bench: Bench, steps: dict[int, Step], num_tokens: int, chunk: int) -> dict[str, Any]:
    """One length: seconds dense and sparse, and attention's share of each."""
    totals = {}
    for name, num_dense in (("dense", bench.num_layers), ("sparse", bench.num_dense_layers)):
        total = {end: step.total_s(bench.num_layers, num_dense) for end, step in steps.items()}
        attention = {end: step.attention_s(bench.num_layers, num_dense) for end, step in steps.items()}
        totals[name] = [_integral(values, num_tokens) / chunk for values in (total, attention)]
    return {
        "num_tokens": num_tokens,
        "dense_s": totals["dense"][0],
        "sparse_s": totals["sparse"][0],
        "speedup": totals["dense"][0] / totals["sparse"][0],
        "attention_share_dense": totals["dense"][1] / totals["dense"][0],
        "attention_share_sparse": totals["sparse"][1] / totals["sparse"][0],
    }


def decode_row(bench: Bench, num_tokens: int) -> dict[str, Any]:
    """Tokens/s at one length, a sequence alone."""
    step = bench.step(num_tokens, 1)
    dense_s = step.total_s(bench.num_layers, bench.num_layers)
    sparse_s = step.total_s(bench.num_layers, bench.num_dense_layers)
    return {
        "num_tokens": num_tokens,
        "dense_tokens_per_s": 1 / dense_s,
        "sparse_tokens_per_s": 1 / sparse_s,
        "speedup": dense_s / sparse_s,
        "attention_share_dense": step.attention_s(bench.num_layers, bench.num_layers) / dense_s,
    }


def _integral(values: dict[int, float], upto: int) -> float:
    """Trapezoids of seconds per chunk over positions; at 0 a chunk costs what the first timed one does."""
    points = [(0, values[min(values)]), *sorted((end, v) for end, v in values.items() if end <= upto)]
    return sum((b - a) * (left + right) / 2 for (a, left), (b, right) in pairwise(points))


def _medians(steps: list[Step]) -> Step:
    names = ("dense_layer_s", "sparse_layer_s", "rest_s")
    return Step(**{name: median(getattr(step, name) for step in steps) for name in names})


def check(bench: Bench, chunk: int, num_tokens: int) -> dict[str, Any]:
    """A whole sparse prefill of the cut model beside the sum of its timed chunks."""
    ends = range(chunk, num_tokens + 1, chunk)
    steps = [bench.step(end, chunk) for end in ends]
    timed = sum(
        step.rest_s * TIMED_LAYERS / bench.num_layers + step.attention_s(TIMED_LAYERS, 1) for step in steps
    )
    bench.whole(num_tokens, chunk, bench.sparse)
    whole = bench.whole(num_tokens, chunk, bench.sparse)
    return {"whole_s": whole, "sum_of_chunks_s": timed, "ratio": timed / whole}


def whole_row(bench: Bench, num_tokens: int, chunk: int) -> dict[str, Any]:
    """Prefills of the timed layers from end to end, all dense and then all sparse."""
    sparse = msgspec.structs.replace(bench.sparse, dense_layers=())
    dense_s, sparse_s = (bench.whole(num_tokens, chunk, each) for each in (None, sparse))
    return {
        "num_tokens": num_tokens,
        "num_layers": TIMED_LAYERS,
        "dense_s": dense_s,
        "sparse_s": sparse_s,
        "speedup": dense_s / sparse_s,
    }


def main() -> None:
    """Time, print the tables, write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=cache_home() / "models/smollm2-135m-instruct")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--budget-tokens", type=int, default=4096)
    parser.add_argument("--whole", type=int, default=None, metavar="N")
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--no-record", action="store_true")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    lengths = [int(length) for length in arguments.lengths.split(",")]
    sparse = SparseAttention(
        budget_tokens=arguments.budget_tokens, dense_below_tokens=0, exact=arguments.exact
    )
    model = load_model(arguments.model, "cpu", torch.float32)
    bench = Bench(model, sparse, max(lengths), arguments.repeats)
    checked = check(bench, arguments.chunk, min(lengths))
    steps = {}
    for end in sorted({arguments.chunk, 2048, *lengths}):
        if end <= max(lengths):
            steps[end] = bench.step(end, arguments.chunk)
            print(f"a chunk that ends at {end}: {steps[end]}", flush=True)
    prefill = [prefill_row(bench, steps, length, arguments.chunk) for length in lengths]
    decode = [decode_row(bench, length) for length in lengths]
    whole = [] if arguments.whole is None else [whole_row(bench, arguments.whole, arguments.chunk)]
    for row in (*prefill, *decode, *whole):
        print({name: round(value, 3) for name, value in row.items()})
    write_record(
        "long-context-cpu",
        settings={"layers": bench.num_layers, "threads": torch.get_num_threads(), "chunk": arguments.chunk}
        | {"budget_tokens": arguments.budget_tokens, "exact": arguments.exact}
        | {"dense_layers": bench.num_dense_layers}
        | {"timed_layers": TIMED_LAYERS, "dtype": "float32", "model": model.impl},
        gate={"passed": 0.7 < checked["ratio"] < 1.4, "chunks_add_up_to_a_prefill": checked},
        results={"prefill": prefill, "decode": decode, "whole": whole},
        keep=not arguments.no_record,
    )


if __name__ == "__main__":
    main()
