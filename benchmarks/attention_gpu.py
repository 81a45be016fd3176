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
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import kvrelay_kernels as kk

ROOT = Path(__file__).parents[1]
KIB = 1024


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Heads, channels and device of the whole run."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    dry_run: bool


@dataclass(kw_only=True)
class Record:
    """What the run found: rows of figures, gates by name, failures by section."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    gates: dict[str, bool] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    ceilings: dict[str, float] = field(default_factory=dict)

    def add(self, section: str, gate: str, **figures: Any) -> None:
        """Keep and print a row; a figure that compares is withheld while its gate is red."""
        passed = self.gates.get(gate, False)
        if not passed:
            figures = {name: value for name, value in figures.items() if not name.startswith("times_")}
        self.rows.append({"section": section, "gate": gate, "gate_passed": passed, **figures})
        shown = "  ".join(f"{name}={_short(value)}" for name, value in figures.items())
        print(f"{section:10} [{gate}: {'pass' if passed else 'FAIL'}]  {shown}", flush=True)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def milliseconds(run: Callable[[], object], setting: Setting, budget_ms: float = 300.0) -> float:
    """Median time of ``run``, after one warm-up, from as many repeats (1 to 20) as ``budget_ms`` holds."""
    run()
    if setting.dry_run:
        return math.nan
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    times: list[float] = []
    while len(times) < 20 and sum(times) < budget_ms:
        events[0].record()
        run()
        events[1].record()
        torch.cuda.synchronize()
        times.append(events[0].elapsed_time(events[1]))
    return sorted(times)[len(times) // 2]


def graph_milliseconds(run: Callable[[], object], setting: Setting) -> float:
    """Time of ``run`` replayed from a CUDA graph, 20 replays a sample."""
    run()
    if setting.dry_run:
        return math.nan
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return milliseconds(lambda: [graph.replay() for _ in range(20)], setting) / 20


def make_cache(lengths: list[int], setting: Setting) -> kk.PagedKV:
    """Random paged keys and values, pages shuffled."""
    pages = [-(-length // 64) for length in lengths]
    shape = (sum(pages), setting.num_kv_heads, 64, setting.head_dim)
    k_pages, v_pages = (torch.randn(shape, dtype=setting.dtype, device=setting.device) for _ in range(2))
    order = torch.randperm(sum(pages), device=setting.device).to(torch.int32)
    table = torch.zeros(len(lengths), max(pages), dtype=torch.int32, device=setting.device)
    for row, part in enumerate(order.split(pages)):
        table[row, : len(part)] = part
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=setting.device)
    return kk.PagedKV(k_pages=k_pages, v_pages=v_pages, block_table=table, seq_lens=seq_lens)


def make_queries(rows: int, setting: Setting) -> Tensor:
    shape = (rows, setting.num_q_heads, setting.head_dim)
    return torch.randn(shape, dtype=setting.dtype, device=setting.device)


def contiguous(kv: kk.PagedKV) -> tuple[Tensor, Tensor]:
    """Keys and values of sequence 0 as ``[1, num_kv_heads, tokens, head_dim]`` for SDPA."""
    tokens = int(kv.seq_lens[0])
    picked = kv.block_table[0, : -(-tokens // 64)].long()
    return tuple(  # type: ignore[return-value]
        pages[picked].transpose(0, 1).flatten(1, 2)[None, :, :tokens] for pages in (kv.k_pages, kv.v_pages)
    )


def sdpa(backend: SDPBackend, q: Tensor, kv: kk.PagedKV) -> Callable[[], Tensor]:
    """Causal SDPA of whole-sequence ``q [tokens, heads, dim]`` by ``backend``; heads expanded beforehand."""
    keys, values = (t.repeat_interleave(q.shape[1] // kv.num_kv_heads, 1) for t in contiguous(kv))
    queries = q.transpose(0, 1)[None].contiguous()

    def run() -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)

    return run


def chunk(tokens: int, setting: Setting) -> Tensor:
    return torch.tensor([0, tokens], dtype=torch.int32, device=setting.device)


def gate_correctness(setting: Setting, record: Record) -> None:
    """Every operation against the float64 reference: error at most twice plain eager's, plus rounding."""
    tokens = 200 if setting.dry_run else 2000
    kv, q = make_cache([tokens], setting), make_queries(tokens, setting)
    cu = chunk(tokens, setting)
    exact = kk.PagedKV(
        k_pages=kv.k_pages.double(),
        v_pages=kv.v_pages.double(),
        block_table=kv.block_table,
        seq_lens=kv.seq_lens,
    )
    keys, values = (t.repeat_interleave(q.shape[1] // kv.num_kv_heads, 1)[0] for t in contiguous(kv))
    logits = q.transpose(0, 1) @ keys.transpose(1, 2) * setting.head_dim**-0.5
    hidden = torch.ones_like(logits[0], dtype=torch.bool).triu(1)
    eager = (logits.masked_fill(hidden, -torch.inf).softmax(-1) @ values).transpose(0, 1)
    dense = kk.paged_prefill(q.double(), exact, cu, impl="reference")[0]
    eps = torch.finfo(setting.dtype).eps
    allowed = 2 * (eager - dense).abs().max().item() + 4 * eps * dense.abs().max().item()

    def within(got: Tensor, want: Tensor) -> bool:
        return bool((got - want).abs().max().item() <= allowed)

    record.gates["prefill"] = within(kk.paged_prefill(q, kv, cu, impl="triton")[0], dense)
    stats = kk.kv_block_stats(kv, impl="triton")
    config = kk.SelectionConfig(budget=4 if setting.dry_run else 12)
    chosen = kk.select_blocks(q, kv, config, cu_seqlens_q=cu, stats=stats, impl="triton")
    want = kk.block_sparse_prefill(q.double(), exact, cu, chosen, impl="reference")[0]
    record.gates["sparse"] = within(kk.block_sparse_prefill(q, kv, cu, chosen, impl="triton")[0], want)
    theirs = kk.select_blocks(
        q, kv, config, cu_seqlens_q=cu, stats=kk.kv_block_stats(kv, impl="reference"), impl="reference"
    )
    used = int(chosen.cu_q_blocks[-1])
    same = (chosen.indices[:used, :, :, None] == theirs.indices[:used, :, None]).any(-1)
    shared = (same & (chosen.indices[:used] >= 0)).sum().item() / theirs.counts[:used].sum().item()
    print(f"lists shared with the float32 reference (near-ties differ): {shared:.4f}")
    record.gates["select"] = torch.equal(chosen.counts, theirs.counts) and shared > 0.9
    row = q[-1:]
    want = kk.paged_decode(row.double(), exact, impl="reference")[0]
    record.gates["decode"] = within(kk.paged_decode(row, kv, impl="triton")[0], want)
    chosen = kk.select_blocks(row, kv, config, stats=stats, impl="triton")
    want = kk.block_sparse_decode(row.double(), exact, chosen, impl="reference")[0]
    got = kk.block_sparse_decode(row, kv, chosen, impl="triton")[0]
    record.gates["sparse decode"] = within(got, want)
    record.gates["ceiling"] = record.gates["sdpa"] = True
    print("gates:", record.gates, flush=True)


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


def attempt(section: str, record: Record, run: Callable[[], Any]) -> Any:
    """Run a section; keep the reason if it fails, and go on."""
    try:
        return run()
    except Exception as error:  # noqa: BLE001 - a benchmark on a borrowed GPU reports and goes on
        record.failures[section] = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"{section}: FAILED", file=sys.stderr)
        traceback.print_exc()
        return None
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


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
        ("long", lambda: measure_lengths([64 * KIB, 512 * KIB, 1024 * KIB], [64, 128], setting, record)),
        ("64 heads", lambda: measure_prefill(1024 * KIB, 128, {}, wide, record)),
        ("12M", lambda: measure_prefill(12 * 1024 * KIB, 64, {}, _narrow(setting), record)),
    ]
    if dry:
        steps = [
            ("lengths", lambda: measure_lengths([192], [4], setting, record)),
            ("decode", lambda: measure_decode(2, 200, setting, record)),
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


def document(setting: Setting, record: Record) -> dict[str, Any]:
    """The JSON record of a run."""
    import triton

    cuda = torch.cuda.is_available()
    host = {
        "platform": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "cuda": torch.version.cuda,
    }
    settings = {name: str(value) for name, value in setting.__dict__.items()}
    return {
        "schema": 1,
        "name": "attention_gpu",
        "command": " ".join(sys.argv),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
        "host": host,
        "settings": settings,
        "gate": {"by_operation": record.gates, "passed": bool(record.gates) and all(record.gates.values())},
        "results": {"ceilings": record.ceilings, "rows": record.rows, "failures": record.failures},
    }


def _without_nan(value: Any) -> Any:
    """The same document with None where nothing was measured: NaN is no JSON."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


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
    out = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    out.mkdir(parents=True, exist_ok=True)
    line = json.dumps(_without_nan(found), default=str)
    (out / ("attention_gpu_dry_run.json" if dry else "attention_gpu.json")).write_text(line + "\n")
    print(line)
    return 0 if found["gate"]["passed"] and not record.failures else 1


if __name__ == "__main__":
    sys.exit(main())
