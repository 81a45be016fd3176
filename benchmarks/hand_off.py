"""Full against sparse hand-off over a link held to a pace: bytes, time to first token, stalls.

    python benchmarks/hand_off.py                      # 7K tokens, 1 and 10 Gbit/s; about four minutes
    python benchmarks/hand_off.py --gbit-per-s 1 --prompt-tokens 2000 --no-record

One prefill worker and several decode workers that take turns. `cold`: the first request, whose prompt is
computed while its KV leaves. `cached`: the same prompt again, for decode workers that have none of it; the
prefill worker has all but the last tokens, so that the transfer is what the first token waits for. Lists are
shared by a group's heads, and ranked by twice the budget: heads with lists of their own together want most
blocks of so short a prompt, and 8,192 candidates are all of it.
The gate: every request gave the same tokens, and a full hand-off never stalled.
"""

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

from kvrelay import LLM, RequestOutput, SamplingParams, SparseAttention
from kvrelay.experiments.record import Gate, make_record, write_record

HERE = Path(__file__).parent
HAND_OFFS = ("full", "sparse")


def main() -> None:
    """Run, print, record."""
    options = _options()
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    tokens: list[list[int]] = []
    for gbit_per_s in options.gbit_per_s:
        for kv_handoff in HAND_OFFS:
            outputs = _run(options, gbit_per_s, kv_handoff)
            tokens += [output.token_ids for output in outputs]
            rows = [_row(output) for output in outputs]
            cell = {"cold": rows[0], "cached": _medians(rows[1:])}
            cells.setdefault(f"{gbit_per_s:g} Gbit/s", {})[kv_handoff] = cell
            print(f"{gbit_per_s:g} Gbit/s, {kv_handoff}: {cell}", flush=True)
    full = [cell["full"][start] for cell in cells.values() for start in ("cold", "cached")]
    gate = Gate(
        checks={
            "all requests gave the same tokens": len({json.dumps(each) for each in tokens}) == 1,
            "a full hand-off has no stalls": all(row["num_stalls"] == 0 for row in full),
        }
    )
    ratios = {pace: _ratios(cell) for pace, cell in cells.items()}
    print(f"full / sparse: {ratios}\ngate: {gate.checks}")
    record = make_record("hand_off", vars(options), gate, {"cells": cells, "full over sparse": ratios})
    if not options.no_record:
        write_record(record, HERE / "results" / "hand_off.json")
    print(json.dumps(record))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompt-tokens", type=int, default=7000)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--budget-tokens", type=int, default=1024)
    parser.add_argument("--local-blocks", type=int, default=8)
    parser.add_argument("--candidate-tokens", type=int, default=0, help="0: twice the budget")
    parser.add_argument("--gbit-per-s", type=float, nargs="+", default=[1.0, 10.0])
    parser.add_argument("--repeats", type=int, default=3, help="cached requests, a decode worker for each")
    parser.add_argument("--prefill-threads", type=int, default=2)
    parser.add_argument("--no-record", action="store_true")
    return parser.parse_args()


def _run(options: argparse.Namespace, gbit_per_s: float, kv_handoff: str) -> list[RequestOutput]:
    """The cold request, then the cached ones."""
    count = options.repeats + 1
    workers = [{"role": "prefill", "threads": options.prefill_threads}]
    workers += [{"role": "decode", "threads": 1} for _ in range(count)]
    llm = LLM(
        options.model,
        dtype=options.dtype,
        workers=workers,
        policy="round_robin",
        transport=f"shm:gbit_per_s={gbit_per_s}",
        kv_handoff=kv_handoff,
        attention=SparseAttention(
            budget_tokens=options.budget_tokens,
            local_blocks=options.local_blocks,
            dense_below_tokens=0,
            top_p=None,
            exact=False,
            candidate_tokens=options.candidate_tokens,
        ),
        num_kv_tokens=options.prompt_tokens + options.output_tokens + 512,
    )
    params = SamplingParams(max_tokens=options.output_tokens, temperature=0.0, ignore_eos=True)
    with llm:
        prompt = _prompt(llm, options.prompt_tokens)
        for worker in range(count):
            llm.generate([prompt[worker + 1 : worker + 65]], params)  # warm up
        return [llm.generate([prompt], params)[0] for _ in range(count)]


def _prompt(llm: LLM, num_tokens: int) -> list[int]:
    """The first tokens of the texts in benchmarks/texts."""
    text = "\n".join(path.read_text() for path in sorted((HERE / "texts").glob("*.txt")))
    found: list[int] = llm.engine.tokenizer.encode(text)
    while len(found) < num_tokens:
        found += found
    return found[:num_tokens]


def _row(output: RequestOutput) -> dict[str, Any]:
    timings, hand_off = output.timings, output.hand_off
    assert timings.ttft_s is not None
    return {
        "ttft_s": timings.ttft_s,
        "after_prefill_s": timings.transfer_wait_s + timings.decode_queue_s + timings.first_decode_s,
        "e2e_s": timings.e2e_s,
        "itl_median_ms": 1e3 * median(timings.itl_s),
        "num_cached_tokens": output.num_cached_tokens,
        "mb_before_first_token": hand_off.bytes_before_first_token / 1e6,
        "mb": hand_off.num_bytes / 1e6,
        "num_stalls": hand_off.num_stalls,
        "stall_s": hand_off.stall_s,
    }


def _medians(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: median(row[name] for row in rows) for name in rows[0]}


def _ratios(cell: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Full over sparse, of the figures that are to be small."""
    names = ("ttft_s", "after_prefill_s", "e2e_s", "mb_before_first_token")
    return {
        start: {name: cell["full"][start][name] / max(1e-9, cell["sparse"][start][name]) for name in names}
        for start in ("cold", "cached")
    }


if __name__ == "__main__":
    main()
