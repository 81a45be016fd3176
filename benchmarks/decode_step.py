"""A worker's decode steps: tokens/s, share of the memory's read bandwidth, and what is not the model.

    python benchmarks/decode_step.py [--threads 2] [--batches 1 4 16] [--context 256] …

Each round runs every implementation at every batch size once, in turn; figures are medians over the rounds.
`read share` is the bytes of the weights a step reads over its time, against a plain sum of as many bytes in
the same round. `overhead` is the share of a whole step of the decode side (plan, tensors, sampling, report)
that is spent outside the call of the model. `first token` is a prompt of 2,048 tokens through `LLM`, against
`transformers` on as many threads; `start` is `kvrelay generate` from the shell to its first token. The gate:
native and torch choose the same tokens in float32, and each sequence the same ones alone and in the batch.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kvrelay import LLM, SamplingParams
from kvrelay.config import EngineConfig, WorkerConfig, cache_home
from kvrelay.experiments.record import Gate, make_record, write_record
from kvrelay.models.hub import resolve
from kvrelay.scheduler.decode import DecodeSequence
from kvrelay.types import RequestId, RequestSpec, WorkerId, num_blocks
from kvrelay.worker.decode import DecodeSide
from kvrelay.worker.loading import load_parts

WAYS = (("native", "float32"), ("native", "bfloat16"), ("torch", "float32"))


@dataclass
class Side:
    """One decode side with its model, and the seconds its runner's logits took."""

    impl: str
    dtype: str
    options: argparse.Namespace
    model_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        settings = EngineConfig(
            model="-", mode="colocated", dtype=self.dtype, model_impl=self.impl, num_kv_blocks=128
        )
        config = WorkerConfig(
            worker_id=WorkerId("colocated-0"),
            role="colocated",
            index=0,
            epoch=1,
            endpoint="",
            run_directory=tempfile.gettempdir(),
            model_directory=str(self.options.directory),
            num_threads=self.options.threads,
            num_workers=1,
            engine=settings,
        )
        self.parts, _ = load_parts(config, None, lambda message: None)
        logits = self.parts.runner.logits

        def timed(batch: list[DecodeSequence]) -> torch.Tensor:
            start_s = time.perf_counter()
            result = logits(batch)
            self.model_s.append(time.perf_counter() - start_s)
            return result

        self.parts.runner.logits = timed  # type: ignore[method-assign]

    def run(self, batch: int, steps: int) -> tuple[float, float, list[list[int]]]:
        """Seconds of a step, of which in the model, and the tokens; contexts are random but the same."""
        side = DecodeSide(self.parts)
        for layer in range(self.parts.store.layout.num_layers):  # pages are alike: any will do
            for pages in self.parts.store.layer(layer):
                pages.copy_(torch.randn(pages.shape[1:], generator=torch.Generator().manual_seed(layer)))
        for index in range(batch):
            request = _request(index, self.options)
            blocks = self.parts.pool.allocate(num_blocks(len(request.token_ids)))
            side.scheduler.run(DecodeSequence(request, blocks, list(request.token_ids)))
        sequences = list(side.scheduler.running)
        side.step()
        self.model_s.clear()
        start_s = time.perf_counter()
        for _ in range(steps):
            side.step()
        step_s = (time.perf_counter() - start_s) / steps
        side.close()
        tokens = [sequence.token_ids[self.options.context :] for sequence in sequences]
        return step_s, sum(self.model_s) / steps, tokens


def main() -> None:
    """Run, print, record."""
    options = _options()
    options.directory = resolve(options.model, cache_home())
    torch.manual_seed(0)
    figures, gate = _steps(options)
    first = _first_token(options)
    starts = [_start_s(options) for _ in range(options.rounds)]
    results = {
        "steps": figures,
        "first_token": first,
        "start_to_first_token_s": {"median": statistics.median(starts), "all": starts},
    }
    for row in (*figures, first):
        print(
            "  ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else str(value) for key, value in row.items()
            )
        )
    print(f"start to first token {starts}", gate.checks)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    record = make_record("decode_step", settings, gate, results)
    write_record(record, Path(__file__).parent / "results" / "decode_step.json")
    print(json.dumps(record))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=2048)
    return parser.parse_args()


def _request(index: int, options: argparse.Namespace) -> RequestSpec:
    generator = torch.Generator().manual_seed(index)
    tokens = torch.randint(100, 40_000, (options.context,), generator=generator).tolist()
    return RequestSpec(
        request_id=RequestId(f"r{index}"),
        attempt=0,
        arrival=index,
        token_ids=tuple(tokens),
        num_prompt_tokens=options.context,
        max_total_tokens=options.context + 1000,
        params=SamplingParams(max_tokens=1000, temperature=0.0, ignore_eos=True),
        seed=0,
    )


def _steps(options: argparse.Namespace) -> tuple[list[dict[str, Any]], Gate]:
    """A row for each way and batch size, and the gate."""
    sides = {way: Side(*way, options) for way in WAYS}
    weight_bytes = options.directory.joinpath("model.safetensors").stat().st_size
    times: dict[tuple[tuple[str, str], int], list[tuple[float, float]]] = {}
    tokens: dict[tuple[tuple[str, str], int], list[list[int]]] = {}
    reads = []
    for _ in range(options.rounds):
        reads.append(_read_bytes_per_s(weight_bytes))
        for batch in options.batches:
            for way, side in sides.items():
                *seconds, tokens[way, batch] = side.run(batch, options.steps)
                times.setdefault((way, batch), []).append((seconds[0], seconds[1]))
    for side in sides.values():
        side.parts.transport.close()
    read = statistics.median(reads)
    rows = [_row(key, measured, read, weight_bytes) for key, measured in times.items()]
    most = max(options.batches)
    checks = {
        "native and torch choose the same tokens in float32": all(
            tokens[WAYS[0], batch] == tokens[WAYS[2], batch] for batch in options.batches
        ),
        "sequences get the same tokens alone and in the batch": all(
            tokens[way, batch] == tokens[way, most][:batch] for way in WAYS[:2] for batch in options.batches
        ),
    }
    return rows, Gate(checks=checks)


def _row(
    key: tuple[tuple[str, str], int], measured: list[tuple[float, float]], read: float, weight_bytes: int
) -> dict[str, Any]:
    (impl, dtype), batch = key
    step_s, model_s = (statistics.median(column) for column in zip(*measured, strict=True))
    read_bytes = weight_bytes * (2 if impl == "torch" else 1)  # the checkpoint is bfloat16, torch widened it
    return {
        "way": f"{impl} {dtype}",
        "batch": batch,
        "step_ms": step_s * 1e3,
        "tokens_per_s": batch / step_s,
        "read_gb_per_s": read_bytes / model_s / 1e9,
        "read_share": read_bytes / model_s / read,
        "overhead_share": 1 - model_s / step_s,
    }


def _read_bytes_per_s(num_bytes: int) -> float:
    """A plain sum of floats, the best of five."""
    values = torch.ones(num_bytes // 4)
    best_s = float("inf")
    for _ in range(5):
        start_s = time.perf_counter()
        values.sum()
        best_s = min(best_s, time.perf_counter() - start_s)
    return num_bytes / best_s


def _first_token(options: argparse.Namespace) -> dict[str, float]:
    """Median seconds to the first token of a long prompt, ours and that of `transformers`, in turn."""
    import transformers

    torch.set_num_threads(options.threads)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(options.directory, dtype=torch.float32)
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    seconds: dict[str, list[float]] = {"native_float32": [], "transformers_float32": []}
    settings: dict[str, Any] = {
        "mode": "colocated",
        "threads_per_worker": options.threads,
        "dtype": "float32",
    }
    with LLM(str(options.directory), model_impl="native", **settings) as llm:
        llm.generate([[1, 2, 3]], params)
        for index in range(options.rounds):
            generator = torch.Generator().manual_seed(index)
            prompt = torch.randint(100, 40_000, (options.prompt_tokens,), generator=generator)
            start_s = time.perf_counter()
            llm.generate([prompt.tolist()], params)
            seconds["native_float32"].append(time.perf_counter() - start_s)
            start_s = time.perf_counter()
            theirs.generate(prompt[None], max_new_tokens=1, do_sample=False)
            seconds["transformers_float32"].append(time.perf_counter() - start_s)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = medians["transformers_float32"] / medians["native_float32"]
    return {"prompt_tokens": options.prompt_tokens, **medians, "transformers_over_native": ratio}


def _start_s(options: argparse.Namespace) -> float:
    """From the shell to the first token on the terminal: `kvrelay generate`, default settings."""
    command = [sys.executable, "-m", "kvrelay", "generate", "--prompt", "The capital of France is"]
    start_s = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--model", options.model], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    process.stdout.read(1)
    seconds = time.perf_counter() - start_s
    process.communicate()
    return seconds


if __name__ == "__main__":
    main()
