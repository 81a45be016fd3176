"""GPU speed of the attention kernels beside FlashAttention-2, cuDNN and measured ceilings, in one run.

Every figure carries the correctness gate of the code it times; a speed-up is printed only beside a green one.
Prints a table, then one JSON document on the last line, also written to ``$OUT`` or ``benchmarks/results/``.
Sections run one after the other and a failing one is recorded and skipped, so a short lease still yields
something. ``--dry-run`` needs no GPU: it interprets tiny shapes, to show that the script itself runs.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend

import kvrelay_kernels as kk
from gpu_gates import gate_correctness
from gpu_peers import measure_peers, sdpa
from gpu_run import (
    Record,
    Setting,
    attempt,
    chunk,
    graph_milliseconds,
    make_cache,
    make_queries,
    milliseconds,
)

ROOT = Path(__file__).parents[1]
KIB = 1024


def measure_ceilings(setting: Setting, record: Record) -> None:
    """Copy bandwidth (read plus write) and a large GEMM, what the kernels are held against."""
    size = 1 << (10 if setting.dry_run else 30)
    source = torch.empty(size, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    record.ceilings["copy_gb_s"] = 2 * size / milliseconds(lambda: target.copy_(source), setting) / 1e6
    width = 64 if setting.dry_run else 8192
    a, b = (torch.randn(width, width, dtype=setting.dtype, device=setting.device) for _ in range(2))
    record.ceilings["gemm_tflop_s"] = 2 * width**3 / milliseconds(lambda: a @ b, setting) / 1e9
    record.add("ceilings", "ceiling", **record.ceilings)


def measure_prefill(
    tokens: int, budget: int, dense_ms: dict[str, float], setting: Setting, record: Record
) -> None:
    """One length and budget: statistics, selection, sparse attention, and their share of everything."""
    kv, q, cu = make_cache([tokens], setting), make_queries(tokens, setting), chunk(tokens, setting)
    config = kk.SelectionConfig(budget=budget)
    stats_ms = milliseconds(lambda: kk.kv_block_stats(kv, impl="triton"), setting)
    stats = kk.kv_block_stats(kv, impl="triton")

    def select() -> kk.BlockSelection:
        return kk.select_blocks(q, kv, config, cu_seqlens_q=cu, stats=stats, impl="triton")

    select_ms = milliseconds(select, setting)
    chosen = select()
    sparse_ms = milliseconds(lambda: kk.block_sparse_prefill(q, kv, cu, chosen, impl="triton"), setting)
    group = setting.num_q_heads // setting.num_kv_heads
    pairs = chosen.attended_pairs(cu.diff(), kv.seq_lens) * group
    dense_pairs = tokens * (tokens + 1) // 2 * setting.num_q_heads
    total_ms = stats_ms + select_ms + sparse_ms
    figures: dict[str, Any] = {
        "tokens": tokens,
        "budget_keys": budget * 64,
        "q_heads": setting.num_q_heads,
        "stats_ms": stats_ms,
        "select_ms": select_ms,
        "sparse_ms": sparse_ms,
        "total_ms": total_ms,
        "overhead_share": (stats_ms + select_ms) / total_ms,
        "sparse_tflop_s": 4 * setting.head_dim * pairs / sparse_ms / 1e9,
        "flop_reduction": dense_pairs / pairs,
    }
    for name, other in dense_ms.items():
        figures[f"times_{name}"] = other / total_ms
    gate = "sparse" if record.gates.get("select") else "select"
    record.add("sparse", gate, **figures)


def measure_dense(tokens: int, setting: Setting, record: Record) -> dict[str, float]:
    """Time of FlashAttention-2, cuDNN and our dense kernel; a backend that cannot run is left out."""
    kv, q, cu = make_cache([tokens], setting), make_queries(tokens, setting), chunk(tokens, setting)
    flops = 4 * setting.head_dim * setting.num_q_heads * tokens * (tokens + 1) // 2
    times: dict[str, float] = {}
    backends = {"fa2": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    if setting.dry_run:
        backends = {"fa2": SDPBackend.MATH}
    for name, backend in backends.items():
        try:
            times[name] = milliseconds(sdpa(backend, q, kv), setting)
            record.add(
                "dense", "sdpa", tokens=tokens, impl=name, ms=times[name], tflop_s=flops / times[name] / 1e9
            )
        except RuntimeError as error:
            record.failures[f"{name} {tokens}"] = str(error).splitlines()[0]
    if tokens <= 128 * KIB:
        ours = milliseconds(lambda: kk.paged_prefill(q, kv, cu, impl="triton"), setting)
        record.add("dense", "prefill", tokens=tokens, impl="ours", ms=ours, tflop_s=flops / ours / 1e9)
    return times


def measure_lengths(lengths: list[int], budgets: list[int], setting: Setting, record: Record) -> None:
    """Dense and sparse at every length, then the growth of total time as an exponent."""
    for tokens in lengths:
        dense = attempt(
            f"dense {tokens}", record, lambda tokens=tokens: measure_dense(tokens, setting, record)
        )
        for budget in budgets:
            attempt(
                f"sparse {tokens} {budget}",
                record,
                lambda tokens=tokens, budget=budget, dense=dense: measure_prefill(
                    tokens, budget, dense or {}, setting, record
                ),
            )
    for budget in budgets:
        points = {
            row["tokens"]: row["total_ms"]
            for row in record.rows
            if row["section"] == "sparse" and row["budget_keys"] == budget * 64 and row["tokens"] >= 64 * KIB
        }
        if len(points) > 1:
            first, last = min(points), max(points)
            exponent = math.log(points[last] / points[first]) / math.log(last / first)
            record.add(
                "exponent", "sparse", budget_keys=budget * 64, of=f"{first}..{last}", exponent=exponent
            )


def measure_decode(batch: int, tokens: int, setting: Setting, record: Record) -> None:
    """Dense and sparse decode of ``batch`` sequences of ``tokens``, replayed from CUDA graphs."""
    kv, q = make_cache([tokens] * batch, setting), make_queries(batch, setting)
    stats = kk.kv_block_stats(kv, impl="triton")
    config = kk.SelectionConfig(budget=4 if setting.dry_run else 64)

    def select() -> kk.BlockSelection:
        return kk.select_blocks(q, kv, config, stats=stats, impl="triton")

    chosen = select()
    dense_ms = graph_milliseconds(lambda: kk.paged_decode(q, kv, impl="triton"), setting)
    select_ms = graph_milliseconds(select, setting)
    sparse_ms = graph_milliseconds(lambda: kk.block_sparse_decode(q, kv, chosen, impl="triton"), setting)
    both_ms = graph_milliseconds(lambda: kk.block_sparse_decode(q, kv, select(), impl="triton"), setting)
    gb_s = 2 * kv.k_pages.nbytes / dense_ms / 1e6
    share = gb_s / record.ceilings.get("copy_gb_s", math.nan)
    shape = {"batch": batch, "tokens": tokens}
    record.add("decode", "decode", **shape, dense_us=1e3 * dense_ms, gb_s=gb_s, share_of_copy=share)
    times = {"select_us": 1e3 * select_ms, "sparse_us": 1e3 * sparse_ms, "both_us": 1e3 * both_ms}
    record.add("decode", "sparse decode", **shape, **times, times_dense=dense_ms / both_ms)


def sections(setting: Setting, record: Record, limit_s: float) -> None:
    """Everything, most wanted first, until ``limit_s`` is spent."""
    start = time.perf_counter()
    dry = setting.dry_run
    attempt("gates", record, lambda: gate_correctness(setting, record))
    attempt("ceilings", record, lambda: measure_ceilings(setting, record))
    wide = Setting(**{**setting.__dict__, "num_q_heads": 2 * setting.num_q_heads})
    steps: list[tuple[str, Callable[[], None]]] = [
        ("lengths", lambda: measure_lengths([16 * KIB, 32 * KIB, 128 * KIB], [64, 128], setting, record)),
        ("decode 1M", lambda: measure_decode(1, 1024 * KIB, setting, record)),
        ("decode 32", lambda: measure_decode(32, 128 * KIB, setting, record)),
        ("peers", lambda: measure_peers(128 * KIB, 64, setting, record)),
        ("long", lambda: measure_lengths([64 * KIB, 512 * KIB, 1024 * KIB], [64, 128], setting, record)),
        ("64 heads", lambda: measure_prefill(1024 * KIB, 128, {}, wide, record)),
        ("12M", lambda: measure_prefill(12 * 1024 * KIB, 64, {}, _narrow(setting), record)),
    ]
    if dry:
        steps = [
            ("lengths", lambda: measure_lengths([192], [4], setting, record)),
            ("decode", lambda: measure_decode(2, 200, setting, record)),
            ("peers", lambda: measure_peers(192, 4, setting, record)),
        ]
    for name, run in steps:
        if time.perf_counter() - start > limit_s:
            record.failures[name] = f"not started: {limit_s:.0f} s were spent"
            continue
        attempt(name, record, run)


def _narrow(setting: Setting) -> Setting:
    """A quarter of the heads: q, k, v, out of a 12M-token layer fit one GPU; time is per head anyway."""
    heads = {"num_q_heads": setting.num_q_heads // 4, "num_kv_heads": setting.num_kv_heads // 4}
    return Setting(**{**setting.__dict__, **heads})


def _record_writer() -> Any:
    """The engine's record writer, from its file: a bare GPU image lacks what the engine around it imports."""
    spec = spec_from_file_location("record", ROOT / "engine/kvrelay/experiments/record.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["record"] = module
    spec.loader.exec_module(module)
    return module


def _without_nan(value: Any) -> Any:
    """The same document with None where nothing was measured: NaN is no JSON."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def document(setting: Setting, record: Record) -> dict[str, Any]:
    """Write the JSON record of a run, and return it."""
    writer = _record_writer()
    settings = {name: str(value) for name, value in setting.__dict__.items()} | {"cuda": torch.version.cuda}
    names = ("ceilings", "rows", "failures", "absent")
    results = _without_nan({name: getattr(record, name) for name in names})
    gate = writer.Gate(checks=record.gates or {"the gates ran": False})
    name = "attention_gpu_dry_run" if setting.dry_run else "attention_gpu"
    found = writer.make_record(name, settings, gate, results)
    writer.write_record(found, Path(os.environ.get("OUT") or ROOT / "benchmarks/results") / f"{name}.json")
    return dict(found)


def main() -> int:
    """Run; exit status 1 if a gate is red or a section failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--dry-run", action="store_true", help="interpret tiny shapes; times are not measured"
    )
    parser.add_argument("--limit-s", type=float, default=300.0, help="start no new section after this")
    arguments = parser.parse_args()
    dry = arguments.dry_run
    setting = Setting(
        num_q_heads=4 if dry else 32,
        num_kv_heads=2 if dry else 8,
        head_dim=64 if dry else 128,
        dtype=torch.float32 if dry else torch.bfloat16,
        device=torch.device("cpu" if dry else "cuda"),
        dry_run=dry,
    )
    record = Record()
    sections(setting, record, arguments.limit_s)
    found = document(setting, record)
    print(json.dumps(found))
    return 0 if found["gate"]["passed"] and not record.failures else 1


if __name__ == "__main__":
    sys.exit(main())
