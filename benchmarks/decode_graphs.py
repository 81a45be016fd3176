"""GPU decode steps at each batch size: over gathered pages, in place, replayed from CUDA graphs, and ahead.

    python benchmarks/decode_graphs.py [--shape smollm2-135m llama-8b] [--batches 1 4 16 32] …

`gathered` is the ordinary path (torch's attention over gathered pages), `uncaptured` the kernels of
`kvrelay.decode_steps` launched one by one, `captured` replays them, `ahead` also begins each step before the
last one's tokens are there, as a worker does. Weights are random; figures are medians over rounds that take
every way in turn. `floor` is the weights' bytes over the bandwidth of a large copy. Gates: all ways choose
the same tokens in float32, replays give the bits of launches, and tokens drawn on the device are those that
the CPU draws from the same logits. `--dry-run` goes through a tiny shape on the CPU, no graphs and no times.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvrelay.cache.store import KVStore
from kvrelay.decode_steps import DecodeSteps, Tokens
from kvrelay.experiments.record import Gate, make_record, write_record
from kvrelay.models.decoder import Decoder, LayerWeights
from kvrelay.models.rope import Rope
from kvrelay.models.spec import ModelSpec
from kvrelay.runner import Runner
from kvrelay.sampler import Row, choose, sample
from kvrelay.sampling_params import SamplingParams
from kvrelay.scheduler.decode import PENDING, DecodeSequence
from kvrelay.types import KVLayout, RequestId, RequestSpec, num_blocks

# vocabulary, hidden, intermediate, layers, query heads, KV heads
SHAPES = {
    "smollm2-135m": (49152, 576, 1536, 30, 9, 3),
    "llama-8b": (128256, 4096, 14336, 32, 32, 8),
    "tiny": (97, 64, 96, 2, 4, 2),
}
WAYS = ("gathered", "uncaptured", "captured", "ahead")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One model with its pages, and a runner for each way."""

    name: str
    runners: dict[str, Runner]
    store: KVStore
    capture_s: float | None

    def batch(self, size: int, context: int, **params: Any) -> list[DecodeSequence]:
        """Sequences of differing lengths around `context`, over pages of their own."""
        blocks_each = num_blocks(context + 200)
        found = []
        for index in range(size):
            length = max(1, context - 7 * index)
            generator = torch.Generator().manual_seed(index)
            vocabulary = self.runners["gathered"].decoder.spec.vocab_size
            request = RequestSpec(
                request_id=RequestId(f"r{index}"),
                attempt=1,
                arrival=index,
                token_ids=tuple(torch.randint(0, vocabulary, (length,), generator=generator).tolist()),
                num_prompt_tokens=length,
                max_total_tokens=length + 10_000,
                params=SamplingParams(max_tokens=10_000, ignore_eos=True, **params),
                seed=index,
            )
            blocks = list(range(index * blocks_each, (index + 1) * blocks_each))
            found.append(DecodeSequence(request, blocks, list(request.token_ids)))
        return found


def main() -> int:
    """Run, print, record; exit status 1 if a gate is red."""
    options = _options()
    torch.manual_seed(0)
    device = torch.device("cpu" if options.dry_run else "cuda")
    checks = _checks(device)
    rows: list[dict[str, Any]] = []
    for shape in ["tiny"] if options.dry_run else options.shape:
        dtype = torch.float32 if options.dry_run else torch.bfloat16
        bench = _bench(shape, dtype, device, max(options.batches), options.context)
        if bench.capture_s is not None:
            checks[f"{shape}: replays give the bits of launches"] = _replays_alike(bench, options)
            torch.cuda.empty_cache()
        rows += _rows(bench, options)
    gate = Gate(checks=checks)
    for row in rows if gate.passed else ():
        print(
            "  ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else str(value) for key, value in row.items()
            )
        )
    name = "decode_graphs_dry_run" if options.dry_run else "decode_graphs"
    record = make_record(
        name, vars(options) | {"cuda": torch.version.cuda}, gate, {"steps": rows if gate.passed else []}
    )
    write_record(record, Path(os.environ.get("OUT") or Path(__file__).parent / "results") / f"{name}.json")
    print(json.dumps(record))
    return 0 if gate.passed else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", nargs="+", choices=sorted(SHAPES), default=["smollm2-135m", "llama-8b"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dry-run", action="store_true")
    return parser.parse_args()


def _checks(device: torch.device) -> dict[str, bool]:
    """The gates that need exact arithmetic, on a small model in float32."""
    bench = _bench("tiny", torch.float32, device, 7, 150)
    tokens = {}
    for way, runner in bench.runners.items():
        batch = bench.batch(7, 150, temperature=0.0)
        _run(way, runner, batch, 40)
        tokens[way] = [sequence.token_ids for sequence in batch]
    logits = torch.randn(64, 50_000) * 4
    params = [
        SamplingParams(temperature=0.2 + 0.1 * i, top_k=i % 3 * 20, top_p=1 - i % 4 * 0.1) for i in range(64)
    ]
    rows = [Row(own, seed, [0] * (seed + 2), 1, ()) for seed, own in enumerate(params)]
    drawn = choose(logits.to(device), rows).tolist()
    sampled = [None if found is None else found[0] for found in sample(logits.clone(), rows)]
    return {
        "all ways choose the same tokens in float32": len({str(found) for found in tokens.values()}) == 1,
        "tokens drawn on the device are those drawn on the CPU": drawn == sampled,
    }


def _replays_alike(bench: Bench, options: argparse.Namespace) -> bool:
    """Whether a replay's logits are those of the same kernels launched one by one, at every batch size."""
    alike = True
    for size in options.batches:
        found = [bench.runners[way].logits(bench.batch(size, options.context)).clone() for way in WAYS[1:3]]
        alike &= torch.equal(*found) and bool(found[0].isfinite().all())
    return alike


def _bench(shape: str, dtype: torch.dtype, device: torch.device, most: int, context: int) -> Bench:
    decoder = random_decoder(shape, dtype, device)
    spec, blocks_each = decoder.spec, num_blocks(context + 200)
    layout = KVLayout(
        model=shape,
        dtype=str(dtype).removeprefix("torch."),
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
    )
    buffer = memoryview(bytearray(most * blocks_each * layout.block_bytes))
    store = KVStore(layout, most * blocks_each, buffer, device, has_spare_page=True)
    for layer in range(layout.num_layers):
        for pages in store.layer(layer):
            pages.copy_(torch.randn(pages.shape[1:], generator=torch.Generator().manual_seed(layer)))
    steps = {way: DecodeSteps(decoder, store, most, blocks_each) for way in WAYS[1:3]}
    capture_s = steps["captured"].capture() if device.type == "cuda" else None
    runners = {way: Runner(decoder, store, frozenset(), None, found) for way, found in steps.items()}
    runners["gathered"] = Runner(decoder, store, frozenset())
    runners["ahead"] = Runner(decoder, store, frozenset(), None, steps["captured"])
    return Bench(name=shape, runners=runners, store=store, capture_s=capture_s)


def random_decoder(shape: str, dtype: torch.dtype, device: torch.device) -> Decoder:
    vocabulary, hidden, intermediate, layers, num_q, num_kv = SHAPES[shape]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": num_q,
        "num_key_value_heads": num_kv,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    spec = ModelSpec.from_config(config, {}, Path(shape))

    def linear(num_out: int, num_in: int) -> Tensor:
        return torch.randn(num_out, num_in, dtype=dtype, device=device) * num_in**-0.5

    def norm() -> Tensor:
        return torch.ones(hidden, dtype=dtype, device=device)

    found = tuple(
        LayerWeights(
            input_norm=norm(),
            qkv=linear((num_q + 2 * num_kv) * spec.head_dim, hidden),
            qkv_bias=None,
            qk_norm=None,
            output=linear(hidden, num_q * spec.head_dim),
            output_bias=None,
            mlp_norm=norm(),
            gate_up=linear(2 * intermediate, hidden),
            gate_up_bias=None,
            down=linear(hidden, intermediate),
            down_bias=None,
        )
        for _ in range(layers)
    )
    table = linear(vocabulary, hidden)
    return Decoder(
        spec=spec,
        rope=Rope(spec.rope, spec.head_dim, device),
        embedding=table,
        layers=found,
        norm=norm(),
        head=table,
    )


def _run(way: str, runner: Runner, batch: list[DecodeSequence], steps: int) -> None:
    """So many tokens for each sequence, as a worker's decode side takes them."""
    begun: list[tuple[list[int], Tokens]] = []
    for _ in range(steps):
        places = [len(sequence.token_ids) for sequence in batch]
        begun.append((places, runner.launch(batch)))
        for sequence in batch:
            sequence.token_ids.append(PENDING)
        while len(begun) > (way == "ahead"):
            _settle(batch, *begun.pop(0))
    for step in begun:
        _settle(batch, *step)


def _settle(batch: list[DecodeSequence], places: list[int], wait: Tokens) -> None:
    for sequence, place, found in zip(batch, places, wait(), strict=True):
        if found is None:
            raise ArithmeticError(f"logits at position {place} are not finite")
        sequence.token_ids[place] = found[0]


def _rows(bench: Bench, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each way and batch size; times are None in a dry run."""
    decoder = bench.runners["gathered"].decoder
    assert isinstance(decoder, Decoder)
    weights = [
        getattr(layer, name) for layer in decoder.layers for name in ("qkv", "output", "gate_up", "down")
    ]
    floor_ms = (sum(weight.nbytes for weight in weights) + decoder.head.nbytes) / _copy_bytes_per_ms(
        decoder.device
    )
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(options.rounds):
        for size in options.batches:
            for way, runner in bench.runners.items():
                batch = bench.batch(size, options.context, temperature=0.0)
                _run(way, runner, batch, 3)
                start_s = time.perf_counter()
                _run(way, runner, batch, options.steps)  # ends with the last tokens on the host
                times.setdefault((way, size), []).append(
                    (time.perf_counter() - start_s) / options.steps * 1e3
                )
    is_timed = bench.capture_s is not None
    return [
        {
            "shape": bench.name,
            "way": way,
            "batch": size,
            "step_ms": statistics.median(found) if is_timed else None,
            "tokens_per_s": size / statistics.median(found) * 1e3 if is_timed else None,
            "floor_ms": floor_ms if is_timed else None,
            "capture_s": bench.capture_s,
        }
        for (way, size), found in times.items()
    ]


def _copy_bytes_per_ms(device: torch.device) -> float:
    """Bytes read and written by a large copy on the device, per millisecond."""
    if device.type != "cuda":
        return math.inf
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    found = []
    for _ in range(5):
        events[0].record()
        target.copy_(source)
        events[1].record()
        torch.cuda.synchronize()
        found.append(events[0].elapsed_time(events[1]))
    return 2 * source.nbytes / min(found)


if __name__ == "__main__":
    sys.exit(main())
