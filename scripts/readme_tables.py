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
        rows.append([name, *(f"{figure:.3g}" if figure < 1000 else f"{figure:.0f}" for figure in figures)])
    return _table(rows) + _source(record, "disaggregation.json")


def selection(record: dict[str, Any]) -> str:
    """Share of the gap between sink + local and the oracle that each selector closes."""
    columns = [(text, budget) for text in ("licences", "python_source") for budget in (8, 16)]
    found = {(row["text"], row["budget"], row["selector"]): row for row in record["results"]["quality"]}
    rows = [["selector", *(f"{text.replace('_', ' ')}, {budget} blocks" for text, budget in columns)]]
    names = ("local", "mean_pool", "antidiagonal", "quest", "two_stage", "tree", "oracle")
    rows += [[f"`{n}`", *(f"{found[(*column, n)]['gap_closed']:.3f}" for column in columns)] for n in names]
    return _table(rows) + _source(record, "selection.json")


TABLES = {"disaggregation": disaggregation, "selection": selection}


def rendered(text: str) -> str:
    """The README with every marked table made anew."""
    for name, render in TABLES.items():
        record = json.loads((RESULTS / f"{name}.json").read_text())
        begin, end = f"<!-- table: {name} -->", f"<!-- end: {name} -->"
        assert text.count(begin) == text.count(end) == 1, f"README.md has no markers for {name}"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{render(record)}\n{end}{rest.partition(end)[2]}"
    return text


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
