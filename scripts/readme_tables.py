"""Renders the README's tables of figures from committed records, so that none can drift from them.

python scripts/readme_tables.py           rewrites README.md between the markers
python scripts/readme_tables.py --check   exits with 1 when README.md differs
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def disaggregation(record: dict[str, Any]) -> str:
    """Colocated against 1P1D: medians, and the ratio."""
    names = {
        "ttft_ms": "TTFT, median (ms)",
        "itl_p50_ms": "ITL p50 (ms)",
        "itl_p99_ms": "ITL p99 (ms)",
        "tokens_per_s_per_stream": "tokens/s per stream",
    }
    medians = record["results"]["medians"]
    rows = [["", "colocated, 2 threads", "1P1D, 1 + 1 threads", "1P1D / colocated"]]
    for key, name in names.items():
        figures = [medians[column][key] for column in ("colocated", "1P1D", "1P1D over colocated")]
        rows.append([name, *map(_figure, figures)])
    return _table(rows) + _source(record, "disaggregation.json")


def selection(record: dict[str, Any]) -> str:
    """Share of the gap between sink + local and the oracle that each selector closes."""
    columns = sorted({(row["text"], row["budget"]) for row in record["results"]["quality"]})
    found = {(row["text"], row["budget"], row["selector"]): row for row in record["results"]["quality"]}
    rows = [["selector", *(f"{text.replace('_', ' ')}, {budget} blocks" for text, budget in columns)]]
    names = ("local", "mean_pool", "antidiagonal", "quest", "two_stage", "tree", "oracle")
    rows += [[f"`{n}`", *(f"{found[(*column, n)]['gap_closed']:.3f}" for column in columns)] for n in names]
    return _table(rows) + _source(record, "selection.json")


def peers(record: dict[str, Any]) -> str:
    """Every server in every cell: output tokens/s and, in brackets, time to first token; ratios to vLLM."""
    cells = record["results"]["cells"]
    names = list(dict.fromkeys(name for servers in cells.values() for name in servers))
    ours = [name for name in names if name.startswith("kvrelay")]
    rows = [["prompt x output @ in flight", *names, *(f"{name} / vllm" for name in ours)]]
    for cell, servers in cells.items():
        figures = [
            f"{servers[n]['tokens_per_s']:.1f} ({servers[n]['ttft_ms']:.0f})" if n in servers else "-"
            for n in names
        ]
        ratios = [
            f"{servers[name]['tokens_per_s'] / servers['vllm']['tokens_per_s']:.2f}"
            if {name, "vllm"} <= servers.keys()
            else "-"
            for name in ours
        ]
        rows.append([cell, *figures, *ratios])
    return _table(rows) + _source(record, f"{record['name']}.json")


def attention(record: dict[str, Any]) -> str:
    """One layer's attention by length: prefill (selection and statistics included) and one decode step."""
    steps = {(row["dtype"], row["tokens"]): row for row in record["results"]["decode"]}
    rows = [
        [
            "tokens, dtype",
            "SDPA (s)",
            "sparse (s)",
            "SDPA / sparse",
            "fewer FLOPs",
            "sparse / GEMM rate",
            "decode: SDPA (ms)",
            "sparse (ms)",
            "SDPA / sparse",
            "dense: read / bandwidth",
        ]
    ]
    for row in record["results"]["prefill"]:
        sparse_s = row["sparse_s"] + row["selection_s"] + row["statistics_s"]
        step = steps[row["dtype"], row["tokens"]]
        figures = (row["sdpa_s"], sparse_s, row["speedup"], row["flop_reduction"])
        decode = (step["sdpa_ms"], step["selection_ms"] + step["sparse_ms"], step["speedup"])
        rows.append(
            [f"{row['tokens']}, {row['dtype']}", *map(_figure, figures), f"{row['sparse_of_gemm']:.0%}"]
        )
        rows[-1] += [*map(_figure, decode), f"{step['dense_of_read']:.0%}"]
    return _table(rows) + _source(record, "attention-cpu.json")


def interference(record: dict[str, Any]) -> str:
    """The running streams' inter-token latency while long prompts are prefilled."""
    names = {
        "itl_p50_ms": "ITL p50 (ms)",
        "itl_p99_ms": "ITL p99 (ms)",
        "stream_tokens_per_s": "streams, tokens/s",
        "prompt_ttft_ms": "long prompt, TTFT (ms)",
    }
    medians = record["results"]["medians"]
    columns = ["colocated", "colocated, chunks of 128", "1P1D", "colocated / 1P1D"]
    rows = [["", *columns]]
    for key, name in names.items():
        rows.append([name, *(_figure(medians[column][key]) for column in columns)])
    return _table(rows) + _source(record, "interference.json")


def disaggregation_map(record: dict[str, Any]) -> str:
    """1P1D over colocated by prompt length and load: above 1, disaggregation lost."""
    cells = {(row["length"], row["load"]): row for row in record["results"]["map"]}
    loads = sorted({load for _, load in cells})
    kinds = {"ttft": "TTFT", "e2e": "end to end", "itl_p99": "ITL p99"}
    rows = [["prompt", *(f"{name}, load {load:g}" for name in kinds.values() for load in loads)]]
    for length in sorted({length for length, _ in cells}):
        ratios = [cells[length, load][f"{kind}_ratio"] for kind in kinds for load in loads]
        rows.append([str(length), *(f"{ratio:.2f}" for ratio in ratios)])
    return _table(rows) + _source(record, "disaggregation_map.json")


def transport(record: dict[str, Any]) -> str:
    """Large messages in GB/s and as a share of memcpy; a single page's latency."""
    rows = [["", "64 MiB in order (GB/s)", "/ memcpy", "shuffled (GB/s)", "/ memcpy", "one page, p50 (µs)"]]
    for name, row in record["results"]["medians"].items():
        keys = ("large_gb_per_s", "large_over_memcpy", "shuffled_gb_per_s", "shuffled_over_memcpy")
        rows.append([name, *(f"{row[key]:.2f}" for key in keys), f"{row['page_us']:.0f}"])
    return _table(rows) + _source(record, "transport.json")


def decode_step(record: dict[str, Any]) -> str:
    """Decode steps of one worker by implementation and batch; the first token, and the start."""
    rows = [
        ["layers, dtype", "batch", "step (ms)", "tokens/s", "weights read / read bandwidth", "not the model"]
    ]
    for row in record["results"]["steps"]:
        shares = (f"{row['read_share']:.0%}", f"{row['overhead_share']:.1%}")
        rows.append(
            [_way(row), str(row["batch"]), _figure(row["step_ms"]), _figure(row["tokens_per_s"]), *shares]
        )
    first, start = record["results"]["first_token"], record["results"]["start_to_first_token_s"]
    lines = (
        f"\n\nFirst token of a {first['prompt_tokens']}-token prompt: {first['native_float32']:.2f} s, "
        f"`transformers` {first['transformers_float32']:.2f} s. "
        f"From the shell to the first token: {start['median']:.1f} s."
    )
    return _table(rows) + lines + _source(record, "decode_step.json")


def _way(row: dict[str, Any]) -> str:
    return f"{row['way']}, temperature {row['temperature']:g}" if row.get("temperature") else str(row["way"])


def hand_off(record: dict[str, Any]) -> str:
    """Full and sparse hand-off at each pace: time to first token and bytes before it, cold and cached."""
    columns = ("link, prompt", "TTFT full (s)", "sparse (s)", "full / sparse", "after prefill, full / sparse")
    rows = [[*columns, "MB before the first token, full", "sparse", "stalls", "stalled (s)"]]
    for pace, cell in record["results"]["cells"].items():
        for start, name in (("cold", "computed"), ("cached", "cached at prefill")):
            full, sparse = cell["full"][start], cell["sparse"][start]
            ratios = record["results"]["full over sparse"][pace][start]
            figures = [full["ttft_s"], sparse["ttft_s"], ratios["ttft_s"], ratios["after_prefill_s"]]
            figures += [full["mb_before_first_token"], sparse["mb_before_first_token"]]
            figures += [sparse["num_stalls"], sparse["stall_s"]]
            rows.append([f"{pace}, {name}", *map(_figure, figures)])
    return _table(rows) + _source(record, "hand_off.json")


def long_context(record: dict[str, Any]) -> str:
    """Prefill seconds and decode tokens/s by length, dense against sparse, and attention's share of them.

    Both sides of the first ratio are sums of chunks that were timed in turn.
    """
    decode = {row["num_tokens"]: row for row in record["results"]["decode"]}
    rows = [
        [
            "tokens",
            "prefill dense (s)",
            "sparse (s)",
            "dense / sparse",
            "end to end: dense (s)",
            "sparse (s)",
            "keys a query, sparse",
            "attention's share, dense",
            "sparse",
            "decode, dense (tokens/s)",
            "sparse (tokens/s)",
        ]
    ]
    for row in record["results"]["prefill"]:
        step = decode[row["num_tokens"]]
        rows.append(
            [
                f"{row['num_tokens'] // 1024}K",
                *(f"{row[f'{kind}_s']:.0f}" for kind in ("dense", "sparse")),
                f"{row['speedup']:.2f}",
                "-" if (whole_s := row["dense_end_to_end_s"]) is None else f"{whole_s:.0f}",
                f"{row['sparse_end_to_end_s']:.0f}",
                f"{row['sparse_tokens_per_query']:.0f}",
                *(f"{row[f'attention_share_{kind}']:.0%}" for kind in ("dense", "sparse")),
                *(f"{step[f'{kind}_tokens_per_s']:.1f}" for kind in ("dense", "sparse")),
            ]
        )
    return _table(rows) + _source(record, "long-context-cpu.json")


def quality(record: dict[str, Any]) -> str:
    """Sparse against dense: text, needles and RULER, each beside dense on the same samples."""
    rows = [
        [
            "settings",
            "texts",
            "keys a query",
            "top-1 as dense",
            "KL (nats)",
            "perplexity / dense",
            "greedy tokens alike",
            "needles found (dense)",
            "RULER (dense)",
        ]
    ]
    for name, row in record["results"]["table"].items():
        text = ["-"] * 6
        if row["texts"]:
            text = [f"{row['texts']}", f"{row['tokens_per_query']:.0f}"]
            text += [f"{row['top1']:.1%}", f"{row['kl']:.3f}"]
            text += [f"{row['ppl_ratio']:.3f}", f"{row['greedy_match']:.3g}"]
        rows.append([f"`{name}`", *text, _beside_dense(row, "needle"), _beside_dense(row, "ruler")])
    return _table(rows) + _source(record, "quality.json")


def _beside_dense(row: dict[str, Any], part: str) -> str:
    """A share with its standard error, dense's on the same questions, and how many those are."""
    count = row[f"num_{part}_questions"]
    if not count:
        return "-"
    own, error, dense = (100 * row[f"{part}{suffix}"] for suffix in ("", "_standard_error", "_of_dense"))
    spread = f" ± {error:.0f}" if error else ""  # each task's answers all alike: no binomial error to tell
    return f"{own:.0f}{spread} % ({dense:.0f} %), n = {count}"


TABLES = {
    "attention-cpu": attention,
    "decode_step": decode_step,
    "disaggregation": disaggregation,
    "disaggregation_map": disaggregation_map,
    "hand_off": hand_off,
    "interference": interference,
    "long-context-cpu": long_context,
    "peers": peers,
    "peers-float32": peers,
    "quality": quality,
    "selection": selection,
    "transport": transport,
}


def rendered(text: str) -> str:
    """The README with every marked table made anew. Every record that has a table must have its markers."""
    for name, render in TABLES.items():
        path = RESULTS / f"{name}.json"
        begin, end = f"<!-- table: {name} -->", f"<!-- end: {name} -->"
        wanted = int(path.exists())
        assert text.count(begin) == text.count(end) == wanted, f"README.md: {begin} once for each record"
        if not wanted:
            continue
        record = json.loads(path.read_text())
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{render(record)}\n{end}{rest.partition(end)[2]}"
    return text


def _figure(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _source(record: dict[str, Any], file: str) -> str:
    host, commit = record["host"], record["commit"][:7]
    gate = "passed" if record["gate"]["passed"] else "FAILED, see the record"
    return (
        f"\n\n`{record['command']}` at {commit}, {host['cores']} cores of {host['cpu']}; gate {gate}; "
        f"[record](benchmarks/results/{file})"
    )


def main() -> int:
    """Rewrite, or check."""
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = rendered(before)
    if "--check" in sys.argv:
        return int(before != after)
    readme.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
