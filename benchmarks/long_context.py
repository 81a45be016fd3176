"""Prefill seconds and decode tokens/s of long contexts, dense against sparse, and attention's share of them.

    python benchmarks/long_context.py                       # real text, 4K to 128K tokens; 40 minutes
    python benchmarks/long_context.py --lengths 4096,8192 --attention '{"budget_tokens": 1024}' --no-record
    python benchmarks/long_context.py --shape llama-8b --layers 4 --device cuda --lengths 131072,1048576

A model reads a text (Python's own standard library) through the engine's layers and attention. The sparse
prefill runs from end to end, chunk after chunk, and is timed at each length on its way. A dense one of 128K
tokens takes a CPU hours, so its chunks are timed where they stand, on that same KV, in turn with sparse ones,
and summed up, interpolated between those positions: a dense chunk's cost is linear in its position. The gate
runs dense prefills too, up to `--whole` tokens, and holds sums of chunks to whole prefills.

Decode steps are one C++ call where the model is in C++, as in an engine. Positions beyond a model's own are
scaled (YaRN). Quality is not looked at here. `--shape` takes random weights and tokens; `--layers` times that
many, and counts them as often as the model has them.
"""

import argparse
import os
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, zip_longest
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import torch

from decode_graphs import SHAPES, random_decoder
from kvrelay.attention import PagedAttention, Span
from kvrelay.cache.memory import memory_bytes
from kvrelay.cache.store import KVStore
from kvrelay.config import cache_home
from kvrelay.launch import SETS_WAITS, worker_environment
from kvrelay.models.decoder import Decoder
from kvrelay.models.loading import load_model
from kvrelay.models.native import NativeDecoder
from kvrelay.models.spec import ModelSpec
from kvrelay.models.tokenizer import Tokenizer
from kvrelay.native_steps import NativeSteps
from kvrelay.sampling_params import SamplingParams
from kvrelay.scheduler.decode import DecodeSequence
from kvrelay.sparse import AttentionUse, SparseAttention
from kvrelay.types import KVLayout, RequestId, RequestSpec, num_blocks
from record import write_record

LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
ENOUGH_S = 20.0  # of timing one chunk over and over
Model = Decoder | NativeDecoder


@dataclass(frozen=True, slots=True, kw_only=True)
class Seconds:
    """A pass through all layers, and what of it was attention."""

    total_s: float
    attention_s: float

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(total_s=self.total_s + other.total_s, attention_s=self.attention_s + other.attention_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """A whole prefill of so many tokens."""

    num_tokens: int
    seconds: Seconds
    use: AttentionUse


class Bench:
    """A model over pages for all of `tokens`; times count for `num_layers`, however many it has left."""

    def __init__(self, model: Model, num_layers: int, tokens: torch.Tensor, chunk: int) -> None:
        self._model, self._tokens, self.chunk = model, tokens, chunk
        self._scale = num_layers / model.spec.num_layers
        self._row = torch.zeros(1, model.spec.hidden_size, device=model.device, dtype=model.dtype)
        layout = KVLayout(
            model="",
            dtype=str(model.dtype).removeprefix("torch."),
            num_layers=model.spec.num_layers,
            num_kv_heads=model.spec.num_kv_heads,
            head_dim=model.spec.head_dim,
        )
        count = num_blocks(len(tokens))
        memory = memoryview(bytearray(memory_bytes(layout, count, keeps_stats=True)))
        self._store = KVStore(layout, count, memory, model.device, keeps_stats=True)

    def prefill(self, lengths: Sequence[int], sparse: SparseAttention | None) -> list[Prefill]:
        """One prefill of the longest of ascending `lengths`, and what it was at each."""
        spent, use, found = Seconds(total_s=0.0, attention_s=0.0), AttentionUse(), []
        for end in range(self.chunk, lengths[-1] + 1, self.chunk):
            seconds, attended = self._forward(end - self.chunk, end, sparse)
            spent, use = spent + seconds, use + attended
            if end in lengths:
                found.append(Prefill(num_tokens=end, seconds=spent, use=use))
        return found

    def step(self, end: int, sparse: SparseAttention, repeats: int) -> tuple[Seconds, Seconds]:
        """The last chunk of `end` tokens: medians, dense and sparse in turn; the first warm up."""
        pairs, begun_s = [], time.perf_counter()
        while not pairs or (len(pairs) <= repeats and time.perf_counter() - begun_s < ENOUGH_S):
            pairs.append([self._forward(end - self.chunk, end, chosen)[0] for chosen in (None, sparse)])
        dense, own = zip(*(pairs[1:] or pairs), strict=True)
        return _medians(dense), _medians(own)

    def decode(self, end: int, sparse: SparseAttention, repeats: int) -> tuple[float, float]:
        """Seconds of a step of one sequence of `end` tokens: medians, dense and sparse in turn."""
        ways = [self.decode_step(end, chosen) for chosen in (None, sparse)]
        pairs, begun_s = [], time.perf_counter()
        while not pairs or (len(pairs) <= repeats and time.perf_counter() - begun_s < ENOUGH_S):
            pairs.append([self._seconds(step) for step in ways])
        dense_s, sparse_s = (median(own) for own in zip(*(pairs[1:] or pairs), strict=True))
        head_s = median(self._seconds(self._head) for _ in range(5))  # once, however many layers there are
        return self._scaled(dense_s, head_s), self._scaled(sparse_s, head_s)

    def decode_step(self, end: int, sparse: SparseAttention | None) -> Callable[[], torch.Tensor]:
        """What computes the logits [1, vocab] after `end` tokens."""
        if not isinstance(self._model, NativeDecoder) or (sparse is not None and sparse.selector != "tree"):
            return lambda: self._head(self._hidden(end - 1, end, sparse)[0])
        token_ids, steps = self._tokens[:end].tolist(), NativeSteps(self._model, self._store, sparse)
        request = RequestSpec(
            request_id=RequestId("long"),
            attempt=1,
            arrival=0,
            token_ids=tuple(token_ids),
            num_prompt_tokens=end,
            max_total_tokens=end + 1,
            params=SamplingParams(),
            seed=0,
        )
        sequence = DecodeSequence(request, list(range(num_blocks(end))), token_ids)

        def step() -> torch.Tensor:
            found = steps.run([sequence])
            assert found is not None
            return found[0]

        return step

    @torch.inference_mode()
    def _head(self, hidden: torch.Tensor | None = None) -> torch.Tensor:
        return self._model.logits(self._row if hidden is None else hidden)

    def _scaled(self, seconds: float, head_s: float) -> float:
        return head_s + (seconds - head_s) * self._scale

    def _seconds(self, step: Callable[[], object]) -> float:
        begin_s = self._now()
        step()
        return self._now() - begin_s

    def _forward(self, start: int, end: int, sparse: SparseAttention | None) -> tuple[Seconds, AttentionUse]:
        spent: list[float] = []
        begin_s = self._now()
        _, attend = self._hidden(start, end, sparse, spent)
        total_s = self._now() - begin_s
        (use,) = attend.uses()
        return Seconds(total_s=total_s * self._scale, attention_s=sum(spent) * self._scale), use

    @torch.inference_mode()
    def _hidden(
        self, start: int, end: int, sparse: SparseAttention | None, spent: list[float] | None = None
    ) -> tuple[torch.Tensor, PagedAttention]:
        prompt_end = start if end - start == 1 else end
        span = Span(start, end - start, range(num_blocks(end)), sparse, prompt_end)
        attend = PagedAttention(self._store, [span])
        positions = torch.arange(start, end, device=self._model.device)
        timed = attend if spent is None else self._timed(attend, spent)
        return self._model.forward(self._tokens[start:end], positions, timed), attend

    def _timed(self, attend: PagedAttention, spent: list[float]) -> Callable[..., torch.Tensor]:
        def timed(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            start_s = self._now()
            out = attend(layer, q, k, v)
            spent.append(self._now() - start_s)
            return out

        return timed

    def _now(self) -> float:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _medians(runs: Sequence[Seconds]) -> Seconds:
    return Seconds(
        total_s=median(run.total_s for run in runs), attention_s=median(run.attention_s for run in runs)
    )


def integral(values: dict[int, float], upto: int, chunk: int) -> float:
    """Seconds of all chunks up to a position, from those of chunks that end at some positions.

    Trapezoids between them; at 0 a chunk costs what the first timed one does.
    """
    points = [(0, values[min(values)]), *sorted((end, v) for end, v in values.items() if end <= upto)]
    return sum((b - a) * (left + right) / 2 for (a, left), (b, right) in pairwise(points)) / chunk


def prefill_row(
    sparse: Prefill, dense: Prefill | None, steps: dict[str, dict[int, Seconds]], chunk: int
) -> dict[str, Any]:
    """One length: dense and sparse as sums of chunks that were timed in turn, and from end to end.

    `dense` is None, and so are its seconds from end to end, where it was not run that far.
    """
    num_tokens, own = sparse.num_tokens, sparse.seconds
    total_s, attention_s = (
        {
            kind: integral({end: getattr(step, name) for end, step in timed.items()}, num_tokens, chunk)
            for kind, timed in steps.items()
        }
        for name in ("total_s", "attention_s")
    )
    return {
        "num_tokens": num_tokens,
        "dense_s": total_s["dense"],
        "sparse_s": total_s["sparse"],
        "speedup": total_s["dense"] / total_s["sparse"],
        "dense_end_to_end_s": None if dense is None else dense.seconds.total_s,
        "sparse_end_to_end_s": own.total_s,
        "attention_share_dense": attention_s["dense"] / total_s["dense"],
        "attention_share_sparse": own.attention_s / own.total_s,
        "sparse_tokens_per_query": sparse.use.attended_tokens_per_query,
    }


def decode_row(num_tokens: int, dense_s: float, sparse_s: float) -> dict[str, Any]:
    """Tokens/s at one length, a sequence alone."""
    return {
        "num_tokens": num_tokens,
        "dense_tokens_per_s": 1 / dense_s,
        "sparse_tokens_per_s": 1 / sparse_s,
        "speedup": dense_s / sparse_s,
    }


def chunks_over_whole(wholes: Sequence[Prefill], steps: dict[int, Seconds], chunk: int) -> dict[str, float]:
    """By length: the sum of its chunks over the seconds of the whole prefill."""
    values = {end: step.total_s for end, step in steps.items()}
    return {
        str(whole.num_tokens): integral(values, whole.num_tokens, chunk) / whole.seconds.total_s
        for whole in wholes
    }


def load(options: argparse.Namespace, num_tokens: int) -> tuple[Model, int, torch.Tensor]:
    """The model with the layers to be timed, how many it has, and the tokens it reads."""
    device = torch.device(options.device)
    if options.shape is not None:
        random = random_decoder(options.shape, torch.bfloat16, device)
        tokens = torch.randint(0, random.spec.vocab_size, (num_tokens,), device=device)
        return cut(random, options.layers), random.spec.num_layers, tokens
    own = ModelSpec.from_directory(options.model).max_position_embeddings
    scaling = f"yarn:{num_tokens / own:g}" if num_tokens > own else None
    model = load_model(options.model, device, torch.float32, rope_scaling=scaling)
    tokens = torch.tensor(text_tokens(options.model, num_tokens), device=device)
    return cut(model, options.layers), model.spec.num_layers, tokens


def cut(model: Model, num_layers: int | None) -> Model:
    """The model's first layers; all of them for None."""
    if num_layers is None:
        return model
    spec = replace(model.spec, num_layers=num_layers)
    if isinstance(model, NativeDecoder):
        return replace(model, spec=spec, transformer=model.transformer.first_layers(num_layers))
    return replace(model, spec=spec, layers=model.layers[:num_layers])


def text_tokens(directory: Path, num_tokens: int) -> list[int]:
    """The first tokens of Python's standard library, module after module."""
    tokenizer, found = Tokenizer.from_directory(directory), list[int]()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        found += tokenizer.encode(path.read_text(), add_special_tokens=False)
        if len(found) >= num_tokens:
            return found[:num_tokens]
    raise ValueError(f"the standard library gives {len(found)} tokens; needed {num_tokens}")


def main() -> None:
    """Time, print the tables, write the record."""
    options = _options()
    lengths = [int(length) for length in options.lengths.split(",")]
    sparse = msgspec.json.decode(options.attention, type=SparseAttention)
    sparse = msgspec.structs.replace(sparse, dense_below_tokens=0)
    model, num_layers, tokens = load(options, max(lengths))
    bench = Bench(model, num_layers, tokens, options.chunk)
    whole = {"dense": bench.prefill([n for n in lengths if n <= options.whole], None)}
    whole["sparse"] = bench.prefill(lengths, sparse)
    print(*whole["dense"], *whole["sparse"], sep="\n", flush=True)
    steps: dict[str, dict[int, Seconds]] = {"dense": {}, "sparse": {}}
    for end in sorted({options.chunk, min(2048, lengths[0]), *lengths}):
        pair = bench.step(end, sparse, options.repeats)
        steps["dense"][end], steps["sparse"][end] = pair
        print(f"a chunk that ends at {end}: {pair}", flush=True)
    pairs = zip_longest(whole["sparse"], whole["dense"])
    prefill = [prefill_row(own, dense, steps, options.chunk) for own, dense in pairs]
    decode = [decode_row(n, *bench.decode(n, sparse, 4 * options.repeats)) for n in lengths]
    for row in (*prefill, *decode):
        print({name: value and round(value, 3) for name, value in row.items()})
    ratios = {name: chunks_over_whole(whole[name], steps[name], options.chunk) for name in steps}
    write_record(
        "long-context-cpu" if options.device == "cpu" else "long-context-gpu",
        settings={**vars(options), "model": model.impl, "attention": msgspec.to_builtins(sparse)}
        | {"threads": torch.get_num_threads(), "num_layers": num_layers, "dtype": str(model.dtype)}
        | {name: os.environ.get(name) for name in sorted(SETS_WAITS)},
        gate={
            "passed": all(0.75 < ratio < 1.33 for own in ratios.values() for ratio in own.values()),
            "sum of chunks over whole prefill": ratios,
        },
        results={"prefill": prefill, "decode": decode},
        keep=not options.no_record,
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=cache_home() / "models/smollm2-135m-instruct")
    parser.add_argument(
        "--shape", choices=sorted(SHAPES), default=None, help="random weights in place of --model"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="ascending, whole chunks")
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--attention", default="{}", help="settings of SparseAttention, in JSON")
    parser.add_argument("--whole", type=int, default=32768, help="dense prefills from end to end up to here")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-record", action="store_true")
    options = parser.parse_args()
    lengths = [int(length) for length in options.lengths.split(",")]
    if lengths != sorted(lengths) or any(length % options.chunk for length in lengths):
        parser.error(f"--lengths {options.lengths}: expected ascending multiples of --chunk {options.chunk}")
    if lengths[0] > options.whole:
        parser.error(f"--whole {options.whole}: the gate needs a dense prefill of at least {lengths[0]}")
    return options


if __name__ == "__main__":
    if not SETS_WAITS & os.environ.keys():  # read when torch is loaded: start again, as a worker
        os.execve(sys.executable, sys.orig_argv, worker_environment())
    main()
