"""Benchmark of block selection: quality on a real model, measured operations, planted needles.

    python benchmarks/selection.py [TEXT ...] [--model NAME] [--quick | --full]

Prints three tables and one record (last line, and ``benchmarks/results/selection.json``); exits 1 when a bar
is missed. ``--quick`` is a smoke test for CI: short text, few layers, no needles above 32K. ``--full`` adds
needles up to 12M tokens (about 4 GB of memory).
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captured_attention import CapturedLayer, capture, load_layers, rope_frequencies, token_ids
from kvrelay.config import cache_home
from kvrelay.experiments.record import Gate, make_record, write_record
from kvrelay.models.decoder import Decoder
from kvrelay.models.hub import resolve
from kvrelay_kernels import SELECTORS, SelectionConfig
from selection_needles import build_haystack, hit_rates, needle_rows
from selection_operations import SelectionOperations, at_most_n_log_n, selection_operations
from selection_quality import LayerQuality, layer_quality, summarise

TEXTS = Path(__file__).parent / "texts"
RESULTS = Path(__file__).parent / "results"
GAP_BARS = {8: 0.93, 16: 0.95}
COST_BAR = 0.10
COST_FROM_TOKENS = 32 * 1024
NEEDLE_SELECTORS = ("mean_pool", "quest", "two_stage", "tree")
NEEDLE_BUDGETS = (16, 64)
MANY_LAYERS_UP_TO = 1024 * 1024

Operations = tuple[int, SelectionOperations]
Measured = tuple[str, int, LayerQuality]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """How much is measured. Tokens, layers and sizes; ``max_groups`` as in ``selection_operations``."""

    num_tokens: int = 6144
    num_layers: int | None = None
    budgets: tuple[int, ...] = (8, 16)
    operation_budgets: tuple[int, ...] = (8, 16, 64)
    operation_tokens: tuple[int, ...] = tuple(n * 1024 for n in (32, 128, 512, 1024, 3072, 4096, 12288))
    max_groups: int = 32
    needle_tokens: tuple[int, ...] = tuple(n * 1024 for n in (32, 128, 512, 1024))
    needle_layers: tuple[int, ...] = (5, 12, 26)
    needle_trials: int = 8
    exact_mass_up_to: int = 128 * 1024


QUICK = Scope(
    num_tokens=2048,
    num_layers=6,
    budgets=(8,),
    operation_budgets=(8,),
    max_groups=8,
    needle_tokens=(32 * 1024,),
    needle_layers=(3,),
    needle_trials=4,
)
FULL = Scope(needle_tokens=tuple(n * 1024 for n in (32, 128, 512, 1024, 4096, 12288)))


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    scope = QUICK if options.quick else FULL if options.full else Scope()
    with torch.no_grad():
        model = load_layers(resolve(options.model, cache_home()), scope.num_layers)
        quality, haystacks = measure_quality(model, options, scope)
        operations = [measure_operations(scope, budget) for budget in scope.operation_budgets]
        needles = measure_needles(haystacks, rope_frequencies(model), scope)
    gate = check_bars(quality, operations)
    results = {
        "quality": quality,
        "operations": [operation_row(each) for counts in operations for each in counts],
        "operations_of_each_selector_at_32k": compare_operations(scope),
        "needles": needles,
    }
    settings = {
        "model": options.model,
        "texts": [path.name for path in options.texts],
        "scope": asdict(scope),
        "selection": asdict(SelectionConfig(budget=8)) | {"budget": None},
    }
    print_tables(results, gate)
    record = make_record("selection", settings, gate, results)
    write_record(record, options.out / "selection.json")
    print(json.dumps(record))
    return 0 if gate.passed else 1


def measure_quality(
    model: Decoder, options: argparse.Namespace, scope: Scope
) -> tuple[list[dict[str, Any]], list[CapturedLayer]]:
    """Rows of every (text, selector, budget), and the first text's layers that needles are hidden in."""
    rows: list[dict[str, Any]] = []
    kept: list[CapturedLayer] = []
    for text in options.texts:
        measured: list[Measured] = []

        def visit(layer: CapturedLayer, measured: list[Measured] = measured, text: Path = text) -> None:
            for selector, budget in product(SELECTORS, scope.budgets):
                config = SelectionConfig(budget=budget, selector=selector)
                measured.append((selector, budget, layer_quality(layer, config)))
            if layer.layer in scope.needle_layers and text == options.texts[0]:
                kept.append(layer)

        capture(model, token_ids(resolve(options.model, cache_home()), text, scope.num_tokens), visit)
        rows += [{"text": text.stem, **row} for row in summarise(measured)]
    return rows, kept


def measure_operations(scope: Scope, budget: int) -> list[Operations]:
    """The tree's counted operations at every length."""
    config = SelectionConfig(budget=budget)
    return [(budget, selection_operations(n, config, scope.max_groups)) for n in scope.operation_tokens]


def operation_row(counted: Operations) -> dict[str, Any]:
    """One line of the table."""
    budget, operations = counted
    return {"budget": budget, **asdict(operations), "share": round(operations.share, 4)}


def compare_operations(scope: Scope) -> dict[str, float]:
    """Share of the attention it feeds, per selector, at 32K tokens and 16 blocks."""
    configs = (SelectionConfig(budget=16, selector=selector) for selector in SELECTORS)
    return {
        config.selector: round(selection_operations(COST_FROM_TOKENS, config, 8).share, 4)
        for config in configs
    }


def measure_needles(layers: list[CapturedLayer], frequencies: Tensor, scope: Scope) -> list[dict[str, Any]]:
    """Hit rates per (length, budget), over all layers' trials."""
    rows = []
    for num_tokens in scope.needle_tokens:
        found: dict[int, dict[str, list[float]]] = {budget: {} for budget in NEEDLE_BUDGETS}
        some = layers if num_tokens <= MANY_LAYERS_UP_TO else layers[1:2]
        for layer in some:
            haystack = build_haystack(layer, frequencies, num_tokens, seed=layer.layer)
            for budget in NEEDLE_BUDGETS:
                configs = [SelectionConfig(budget=budget, selector=name) for name in NEEDLE_SELECTORS]
                exact = num_tokens <= scope.exact_mass_up_to and budget == NEEDLE_BUDGETS[0]
                hits = needle_rows(haystack, configs, scope.needle_trials, seed=layer.layer, exact=exact)
                for name, values in hits.items():
                    found[budget].setdefault(name, []).extend(values)
        rows += [
            {
                "num_tokens": num_tokens,
                "budget": budget,
                "trials": len(values["tree"]),
                **hit_rates(values),
            }
            for budget, values in found.items()
        ]
    return rows


def check_bars(quality: list[dict[str, Any]], operations: list[list[Operations]]) -> Gate:
    """The bars, each by name."""
    checks = {
        f"tree closes {GAP_BARS[row['budget']]} of the gap, {row['text']}, {row['budget']} blocks": row[
            "gap_closed"
        ]
        >= GAP_BARS[row["budget"]]
        for row in quality
        if row["selector"] == "tree"
    }
    counts = [each for series in operations for _, each in series]
    long = [each.share for each in counts if each.num_tokens >= COST_FROM_TOKENS]
    checks[f"selection costs at most {COST_BAR} of the attention from 32K on"] = max(long) <= COST_BAR
    grows = [at_most_n_log_n([each for _, each in series]) for series in operations]
    checks["selection grows at most as n log n"] = all(grows)
    return Gate(checks=checks)


def print_tables(results: dict[str, Any], gate: Gate) -> None:
    for title in ("quality", "operations", "needles"):
        rows = results[title]
        if not rows:
            continue
        names = list(dict.fromkeys(name for row in rows for name in row))
        cells = [[str(row.get(name, "")) for name in names] for row in rows]
        widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
        print(f"\n{title}")
        for line in (names, *cells):
            print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    print(f"\nselection / attention at 32K, 16 blocks: {results['operations_of_each_selector_at_32k']}")
    print(f"gate: {gate.checks}\n")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("texts", nargs="*", type=Path, default=sorted(TEXTS.glob("*.txt")))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record")
    scope = parser.add_mutually_exclusive_group()
    scope.add_argument("--quick", action="store_true")
    scope.add_argument("--full", action="store_true")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
