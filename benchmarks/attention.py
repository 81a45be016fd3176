"""Speed of attention on this CPU: dense SDPA, our dense, sparse, selection and statistics, by length.

    python benchmarks/attention.py            # 8K to 128K, many minutes: dense attention at 128K is slow
    python benchmarks/attention.py --quick    # seconds, for CI

Ceilings (GEMM, read and copy bandwidth) and the peer (``scaled_dot_product_attention``) are measured in the
same run. A speed-up is printed only where the correctness gate beside it passed.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT / "engine")]

import kvrelay_kernels as kk  # noqa: E402
from kvrelay.experiments.record import Gate, make_record, write_record  # noqa: E402

OURS = ("sparse", "selection", "statistics")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
sdpa = torch.nn.functional.scaled_dot_product_attention


@dataclass(frozen=True, kw_only=True)
class Case:
    """One sequence of ``n`` tokens: queries, its paged cache, and the same cache as SDPA wants it."""

    n: int
    q: Tensor
    kv: kk.PagedKV
    keys: Tensor  # [1, num_kv_heads, n, head_dim]
    values: Tensor
    config: kk.SelectionConfig

    @property
    def cu_seqlens_q(self) -> Tensor:
        return torch.tensor([0, self.n], dtype=torch.int32)

    @property
    def heads(self) -> Tensor:
        return self.q.transpose(0, 1)[None].contiguous()

    @property
    def kv_bytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()


def make_case(n: int, dtype: torch.dtype, options: argparse.Namespace) -> Case:
    generator = torch.Generator().manual_seed(n)
    pages = n // kk.BLOCK_SIZE
    shape = (pages, options.kv_heads, kk.BLOCK_SIZE, options.head_dim)
    k_pages, v_pages = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    keys, values = (p.transpose(0, 1).reshape(1, shape[1], n, shape[3]) for p in (k_pages, v_pages))
    return Case(
        n=n,
        q=torch.randn(n, options.q_heads, shape[3], generator=generator).to(dtype),
        kv=kk.PagedKV(
            k_pages=k_pages,
            v_pages=v_pages,
            block_table=torch.arange(pages, dtype=torch.int32)[None],
            seq_lens=torch.tensor([n], dtype=torch.int32),
        ),
        keys=keys,
        values=values,
        config=kk.SelectionConfig(budget=options.budget // kk.BLOCK_SIZE),
    )


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def timed(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Times of each in seconds, taken in turns so that a busy neighbour hits all alike."""
    rounds = [{name: seconds(run) for name, run in runs.items()} for _ in range(repeats)]
    return {name: [times[name] for times in rounds] for name in runs}


def speedup(peer: list[float], *ours: list[float]) -> float:
    """Median over the rounds of the peer's time over the sum of ours in the same round."""
    return median(p / sum(parts) for p, *parts in zip(peer, *ours, strict=True))


def ceilings(repeats: int) -> dict[str, float]:
    """Largest rates this machine shows: GFLOP/s of a GEMM, GB/s of reading and of copying 256 MiB."""
    a, b = torch.randn(2, 2048, 2048)
    source = torch.randn(64 << 20)
    target = torch.empty_like(source)
    runs: dict[str, Callable[[], object]] = {
        "gemm": lambda: a @ b,
        "read": lambda: source.sum(),
        "copy": lambda: target.copy_(source),
    }
    best = {name: min(times) for name, times in timed(runs, 2 * repeats + 1).items()}
    return {
        "gemm_gflops": 2 * 2048**3 / best["gemm"] / 1e9,
        "read_gbs": source.numel() * 4 / best["read"] / 1e9,
        "copy_gbs": source.numel() * 8 / best["copy"] / 1e9,
    }


def sampled_error(
    case: Case, q: Tensor, rows: list[int], out: Tensor, selection: kk.BlockSelection | None
) -> tuple[float, float]:
    """(error, allowed) of rows of ``out`` against float64: twice plain eager's own, plus rounding."""
    error = allowed = 0.0
    group = q.shape[1] // case.kv.num_kv_heads
    first = case.n - q.shape[0]
    for row in rows:
        for head in range(case.kv.num_kv_heads):
            visible = torch.arange(case.n) <= first + row
            if selection is not None:
                slot = row // kk.BLOCK_SIZE
                listed = selection.indices[slot, head, : selection.counts[slot, head]]
                visible &= torch.isin(torch.arange(case.n) // kk.BLOCK_SIZE, listed)
            keys, values = case.keys[0, head, visible], case.values[0, head, visible]
            mine = slice(head * group, (head + 1) * group)
            exact, plain = (_eager(q[row, mine], keys, values, dtype) for dtype in (torch.float64, q.dtype))
            error = max(error, (out[row, mine].double() - exact).abs().max().item())
            rounding = 4 * torch.finfo(q.dtype).eps * exact.abs().max().item()
            allowed = max(allowed, 2 * (plain.double() - exact).abs().max().item() + rounding)
    return error, allowed


def _eager(q: Tensor, keys: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    return (q.to(dtype) @ keys.to(dtype).T * keys.shape[1] ** -0.5).softmax(-1) @ values.to(dtype)


def prefill(case: Case, options: argparse.Namespace, ceiling: dict[str, float]) -> dict[str, Any]:
    """One row of the prefill table."""
    bounds = case.cu_seqlens_q
    stats = kk.kv_block_stats(case.kv, impl=options.impl)
    arguments: dict[str, Any] = {"cu_seqlens_q": bounds, "stats": stats, "impl": options.impl}
    selection = kk.select_blocks(case.q, case.kv, case.config, **arguments)
    out, _ = kk.block_sparse_prefill(case.q, case.kv, bounds, selection, impl=options.impl)
    rows = [*torch.randint(case.n, (8,)).tolist(), case.n - 1]
    error, allowed = sampled_error(case, case.q, rows, out, selection)
    sdpa_heads, run_sdpa = sdpa_prefill(case, options)
    runs: dict[str, Callable[[], object]] = {
        "sdpa": run_sdpa,
        "sparse": lambda: kk.block_sparse_prefill(case.q, case.kv, bounds, selection, impl=options.impl),
        "selection": lambda: kk.select_blocks(case.q, case.kv, case.config, **arguments),
        "statistics": lambda: kk.kv_block_stats(case.kv, impl=options.impl),
    }
    if case.n <= options.dense_max:
        runs["dense"] = lambda: kk.paged_prefill(case.q, case.kv, bounds, impl=options.impl)
    times = timed(runs, options.repeats)
    times["sdpa"] = [one * case.q.shape[1] / sdpa_heads for one in times["sdpa"]]
    typical = {name: median(column) for name, column in times.items()}
    group = case.q.shape[1] // case.kv.num_kv_heads
    pairs = group * selection.attended_pairs(bounds.diff(), case.kv.seq_lens)
    dense_pairs = case.q.shape[1] * case.n * (case.n + 1) // 2
    flops = 4 * case.kv.head_dim
    passed = error <= allowed
    return {
        "tokens": case.n,
        "dtype": str(case.q.dtype).removeprefix("torch."),
        "sdpa_heads_timed": sdpa_heads,
        **{f"{name}_s": typical.get(name) for name in ("sdpa", "dense", "sparse", "selection", "statistics")},
        "sdpa_gflops": flops * dense_pairs / typical["sdpa"] / 1e9,
        "dense_gflops": flops * dense_pairs / typical["dense"] / 1e9 if "dense" in typical else None,
        "sparse_gflops": flops * pairs / typical["sparse"] / 1e9,
        "sparse_of_gemm": flops * pairs / typical["sparse"] / 1e9 / ceiling["gemm_gflops"],
        "statistics_gbs": case.kv_bytes / 2 / typical["statistics"] / 1e9,
        "flop_reduction": dense_pairs / pairs,
        "speedup": speedup(times["sdpa"], *(times[name] for name in OURS)) if passed else None,
        "error": error,
        "allowed_error": allowed,
        "passed": passed,
    }


def sdpa_prefill(case: Case, options: argparse.Namespace) -> tuple[int, Callable[[], object]]:
    """The peer, and on how many query heads; heads cost the same, so the caller scales up to all.

    All heads up to ``sdpa_full_max`` tokens; beyond, as few as take about the same time, at least one.
    """
    total = case.q.shape[1]
    heads = max(1, min(total, total * options.sdpa_full_max**2 // case.n**2))
    group = total // case.kv.num_kv_heads
    q = case.heads[:, :heads]
    keys, values = (t[:, : -(-heads // group)] for t in (case.keys, case.values))
    return heads, lambda: sdpa(q, keys, values, is_causal=True, enable_gqa=True)


def decode(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """One row of the decode table: the last token, batch 1. Bandwidth is read between the runs."""
    q, impl = case.q[-1:], options.impl
    stats = kk.kv_block_stats(case.kv, impl=impl)
    selection = kk.select_blocks(q, case.kv, case.config, stats=stats, impl=impl)
    gates = [
        sampled_error(case, q, [0], kk.block_sparse_decode(q, case.kv, selection, impl=impl)[0], selection),
        sampled_error(case, q, [0], kk.paged_decode(q, case.kv, impl=impl)[0], None),
    ]
    grouped, memory = q.view(1, case.kv.num_kv_heads, -1, case.kv.head_dim), torch.randn(64 << 20)
    runs: dict[str, Callable[[], object]] = {
        "sdpa": lambda: sdpa(q[:, :, None], case.keys, case.values, enable_gqa=True),
        "sdpa_grouped": lambda: sdpa(grouped, case.keys, case.values),  # heads as rows: reads K, V once
        "read": lambda: memory.sum(),
        "rest": lambda: time.sleep(0.01),  # SDPA's threads spin for a while after a call, on our cores
        "dense": lambda: kk.paged_decode(q, case.kv, impl=impl),
        "selection": lambda: kk.select_blocks(q, case.kv, case.config, stats=stats, impl=impl),
        "sparse": lambda: kk.block_sparse_decode(q, case.kv, selection, impl=impl),
    }
    times = timed(runs, 5 * options.repeats)
    typical = {name: median(column) for name, column in times.items()}
    passed = all(error <= allowed for error, allowed in gates)
    ours = (times["selection"], times["sparse"])
    read_gbs, dense_gbs = memory.numel() * 4 / typical["read"] / 1e9, case.kv_bytes / typical["dense"] / 1e9
    return {
        "tokens": case.n,
        "dtype": str(q.dtype).removeprefix("torch."),
        **{f"{name}_ms": 1e3 * value for name, value in typical.items() if name not in ("read", "rest")},
        "dense_gbs": dense_gbs,
        "read_gbs": read_gbs,
        "dense_of_read": dense_gbs / read_gbs,
        "speedup": speedup(times["sdpa"], *ours) if passed else None,
        "speedup_over_grouped": speedup(times["sdpa_grouped"], *ours) if passed else None,
        "passed": passed,
    }


def crossover(rows: list[dict[str, Any]]) -> int | None:
    """Shortest length from which sparse, selection and statistics beat SDPA at every longer one too."""
    found = None
    for row in sorted(rows, key=lambda row: -row["tokens"]):
        if not row["speedup"] or row["speedup"] <= 1:
            break
        found = row["tokens"]
    return found


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows as a table, the gate in the last column."""
    columns = [name for name in rows[0] if name not in ("error", "allowed_error")]
    print(f"\n{title}\n" + "  ".join(columns))
    for row in rows:
        print("  ".join(_cell(row[column]).rjust(len(column)) for column in columns))


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 32768, 65536, 131072])
    parser.add_argument("--bf16-max", type=int, default=32768, help="longest prefill measured in bfloat16")
    parser.add_argument("--dense-max", type=int, default=32768, help="longest prefill of our own dense")
    parser.add_argument("--sdpa-full-max", type=int, default=32768, help="longest SDPA prefill of all heads")
    parser.add_argument("--budget", type=int, default=4096, help="attended keys per query")
    parser.add_argument("--q-heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--impl", default="cpu")
    parser.add_argument("--quick", action="store_true", help="1K and 2K tokens, budget 512; keeps no record")
    options = parser.parse_args()
    if options.quick:
        options.lengths, options.budget = [1024, 2048], 512
    return options


def main() -> int:
    options = parse()
    ceiling = ceilings(options.repeats)
    print({name: round(value, 1) for name, value in ceiling.items()}, "backend", kk.cpu_backend())
    prefills, decodes = [], []
    for name, dtype in DTYPES.items():
        for n in options.lengths:
            case = make_case(n, dtype, options)
            if name == "float32" or n <= options.bf16_max:
                prefills.append(prefill(case, options, ceiling))
                print(f"prefill {name} {n}: speed-up {prefills[-1]['speedup']}", flush=True)
            decodes.append(decode(case, options))
    show("Prefill", prefills)
    show("Decode, batch 1", decodes)
    within = all(row["passed"] for row in (*prefills, *decodes))
    gate = Gate(checks={"sampled rows: at most twice plain eager's error, plus rounding": within})
    crossovers = {name: crossover([row for row in prefills if row["dtype"] == name]) for name in DTYPES}
    results = {"ceilings": ceiling, "crossover_tokens": crossovers, "prefill": prefills, "decode": decodes}
    settings = {**vars(options), "backend": kk.cpu_backend(), "threads": torch.get_num_threads()}
    record = make_record("attention-cpu", settings, gate, results)
    if not options.quick:
        write_record(record, ROOT / "benchmarks/results/attention-cpu.json")
    print(json.dumps(record))
    return 0 if gate.passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
