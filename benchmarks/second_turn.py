"""Time to first token of a second turn, with KV kept in the pages, in host memory, in files, or not at all.

    python benchmarks/second_turn.py [--prompt-tokens 7000] [--mode colocated] …

Between the turns another conversation of the same length takes all pages (but for `pages`, whose pool holds
both). Prints each case's first and second turn and their ratio; the last line is the JSON record, also
written to benchmarks/results/. The gate: every case gave the tokens of `nothing`, which always runs, in both
turns, and found KV where it should.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from kvrelay import LLM, SamplingParams
from kvrelay.experiments.record import Gate, make_record, write_record

CASES = ("pages", "host", "file")
QUESTION_TOKENS = 40
GIB = 2**30


def main() -> None:
    """Run, print, record."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="kvrelay-second-turn-") as directory:
        turns = {case: _run(options, case, directory) for case in ("nothing", *options.cases)}
    tokens = {case: turn.pop("token_ids") for case, turn in turns.items()}
    found = {case: turn["num_cached_tokens"] for case, turn in turns.items()}
    checks = {
        "all cases gave the same tokens": len({json.dumps(each) for each in tokens.values()}) == 1,
        "kept KV was found": all(
            found[case] > options.prompt_tokens - 64 for case in found if case != "nothing"
        ),
        "nothing kept, nothing found": found["nothing"] == 0,
    }
    for case, turn in turns.items():
        print(f"{case:8} " + "  ".join(f"{key} {value:.4g}" for key, value in turn.items()))
    gate = Gate(checks=checks)
    print(f"gate: {gate.checks}")
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    record = make_record("second_turn", settings, gate, turns)
    write_record(record, options.out / "second_turn.json")
    print(json.dumps(record))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--mode", default="colocated", choices=("colocated", "disaggregated"))
    parser.add_argument("--prompt-tokens", type=int, default=7000)
    parser.add_argument("--output-tokens", type=int, default=16)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES, help="beside nothing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def _run(options: argparse.Namespace, case: str, directory: str) -> dict[str, Any]:
    length = options.prompt_tokens + 2 * options.output_tokens + QUESTION_TOKENS
    num_blocks = (-(-length // 64) + 1) * (2 if case == "pages" else 1)
    kept: dict[str, dict[str, Any]] = {
        "host": {"kv_host_bytes": GIB},
        "file": {"kv_file_bytes": GIB, "kv_file_directory": directory},
    }
    settings = {"mode": options.mode, "dtype": options.dtype, "num_kv_blocks": num_blocks}
    params = SamplingParams(max_tokens=options.output_tokens, temperature=0.0, ignore_eos=True)
    with LLM(options.model, **settings, prefix_cache=case != "nothing", **kept.get(case, {})) as llm:
        source = random.Random(0)
        vocab = llm.engine.spec.vocab_size
        mine, other = ([source.randrange(100, vocab) for _ in range(options.prompt_tokens)] for _ in range(2))
        llm.generate([mine[::-1][:64]], params)  # warm up
        (first,) = llm.generate([mine], params)
        llm.generate([other], params)
        question = [source.randrange(100, vocab) for _ in range(QUESTION_TOKENS)]
        (second,) = llm.generate([mine + first.token_ids + question], params)
    first_s, second_s = first.timings.ttft_s or 0.0, second.timings.ttft_s or 0.0
    return {
        "first_ttft_s": first_s,
        "second_ttft_s": second_s,
        "second_over_first": second_s / first_s,
        "num_cached_tokens": second.num_cached_tokens,
        "token_ids": [first.token_ids, second.token_ids],
    }


if __name__ == "__main__":
    main()
