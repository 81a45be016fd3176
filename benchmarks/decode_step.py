"""A worker's decode steps: tokens/s, share of the memory's read bandwidth, and what is not the model.

    python benchmarks/decode_step.py [--threads 2] [--batches 1 4 16] [--context 256] …

Each round runs every implementation at every batch size once, in turn; figures are medians over the rounds.
Tokens are greedy, and once more drawn at temperature 1, which is the default of `SamplingParams`.
`read share` is the bytes of the weights a step reads over its time, against a plain sum of as many bytes in
the same round. `overhead` is the share of a whole step of the decode side (plan, block tables and tensors,
sampling, report) that is spent outside the model: of `kvr_step`, or torch's layers and attention. `first
token` is a prompt of 2,048 tokens through `LLM`, against `transformers` on as many threads, both warm and
first in turn; `start` is `kvrelay generate` from the shell to its first token. The gate: native and torch
choose the same tokens in float32, and each sequence the same ones alone and in the batch.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from kvrelay import LLM, SamplingParams
from kvrelay.config import EngineConfig, WorkerConfig, cache_home
from kvrelay.experiments.record import Gate, make_record, write_record
from kvrelay.models.decoder import Decoder
from kvrelay.models.hub import resolve
from kvrelay.scheduler.decode import DecodeSequence
from kvrelay.types import RequestId, RequestSpec, WorkerId, num_blocks
from kvrelay.worker.decode import DecodeSide
from kvrelay.worker.loading import load_parts
from kvrelay_kernels.cpu.native.library import library

WAYS = (("native", "float32"), ("native", "bfloat16"), ("torch", "float32"))
Key = tuple[tuple[str, str], int, float]  # way, batch, temperature


@dataclass
class Side:
    """One decode side with its model."""

    impl: str
    dtype: str
    options: argparse.Namespace

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

    def run(self, batch: int, temperature: float) -> tuple[float, float, list[list[int]]]:
        """Seconds of a step, of which in the model, and the tokens; contexts are random but the same."""
        side, steps = DecodeSide(self.parts), self.options.steps
        for layer in range(self.parts.store.layout.num_layers):  # pages are alike: any will do
            for pages in self.parts.store.layer(layer):
                pages.copy_(torch.randn(pages.shape[1:], generator=torch.Generator().manual_seed(layer)))
        for index in range(batch):
            request = _request(index, temperature, self.options)
            blocks = self.parts.pool.allocate(num_blocks(len(request.token_ids)))
            side.scheduler.run(DecodeSequence(request, blocks, list(request.token_ids)))
        sequences = list(side.scheduler.running)
        side.step()
        model_s: list[float] = []
        with ExitStack() as timing:
            for owner, name in self._model():
                timing.enter_context(patch.object(owner, name, _timed(getattr(owner, name), model_s)))
            start_s = time.perf_counter()
            for _ in range(steps):
                side.step()
            step_s = (time.perf_counter() - start_s) / steps
        side.close()
        tokens = [sequence.token_ids[self.options.context :] for sequence in sequences]
        return step_s, sum(model_s) / steps, tokens

    def _model(self) -> list[tuple[Any, str]]:
        return (
            [(library(), "kvr_step")]
            if self.impl == "native"
            else [(Decoder, "forward"), (Decoder, "logits")]
        )


def _timed(call: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def timed(*arguments: Any, **named: Any) -> Any:
        start_s = time.perf_counter()
        result = call(*arguments, **named)
        seconds.append(time.perf_counter() - start_s)
        return result

    return timed


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


def _request(index: int, temperature: float, options: argparse.Namespace) -> RequestSpec:
    generator = torch.Generator().manual_seed(index)
    tokens = torch.randint(100, 40_000, (options.context,), generator=generator).tolist()
    return RequestSpec(
        request_id=RequestId(f"r{index}"),
        attempt=0,
        arrival=index,
        token_ids=tuple(tokens),
        num_prompt_tokens=options.context,
        max_total_tokens=options.context + 1000,
        params=SamplingParams(max_tokens=1000, temperature=temperature, ignore_eos=True),
        seed=index,
    )


def _steps(options: argparse.Namespace) -> tuple[list[dict[str, Any]], Gate]:
    """A row for each way and batch size, and the gate."""
    sides = {way: Side(*way, options) for way in WAYS}
    weight_bytes = options.directory.joinpath("model.safetensors").stat().st_size
    times: dict[Key, list[tuple[float, float]]] = {}
    tokens: dict[Key, list[list[int]]] = {}
    reads = []
    for _ in range(options.rounds):
        reads.append(_read_bytes_per_s(weight_bytes))
        for batch in options.batches:
            for way, side in sides.items():
                for temperature in (0.0, 1.0):
                    key = (way, batch, temperature)
                    *seconds, tokens[key] = side.run(batch, temperature)
                    times.setdefault(key, []).append((seconds[0], seconds[1]))
    for side in sides.values():
        side.parts.close()
    read = statistics.median(reads)
    rows = [_row(key, measured, read, weight_bytes) for key, measured in times.items()]
    most = max(options.batches)
    checks = {
        "native and torch choose the same tokens in float32": all(
            tokens[WAYS[0], batch, 0.0] == tokens[WAYS[2], batch, 0.0] for batch in options.batches
        ),
        "sequences get the same tokens alone and in the batch": all(
            tokens[way, batch, t] == tokens[way, most, t][:batch]
            for way in WAYS[:2]
            for batch in options.batches
            for t in (0.0, 1.0)
        ),
    }
    return rows, Gate(checks=checks)


def _row(key: Key, measured: list[tuple[float, float]], read: float, weight_bytes: int) -> dict[str, Any]:
    (impl, dtype), batch, temperature = key
    step_s, model_s = (statistics.median(column) for column in zip(*measured, strict=True))
    read_bytes = weight_bytes * (2 if impl == "torch" else 1)  # the checkpoint is bfloat16, torch widened it
    return {
        "way": f"{impl} {dtype}",
        "temperature": temperature,
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
        calls = {
            "native_float32": lambda prompt: llm.generate([prompt.tolist()], params),
            "transformers_float32": lambda prompt: theirs.generate(
                prompt[None], max_new_tokens=1, do_sample=False
            ),
        }
        for call in calls.values():
            call(torch.arange(1, 65))
        for index in range(options.rounds):
            generator = torch.Generator().manual_seed(index)
            prompt = torch.randint(100, 40_000, (options.prompt_tokens,), generator=generator)
            for name in list(calls)[:: -1 if index % 2 else 1]:
                start_s = time.perf_counter()
                calls[name](prompt)
                seconds[name].append(time.perf_counter() - start_s)
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
