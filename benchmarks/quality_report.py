"""Cells of the quality benchmark to one table, record and heat map, each beside dense on the same cells."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import msgspec

from kvrelay.sparse import AttentionUse, SparseAttention
from quality_tasks import DEPTHS, RULER
from record import RESULTS, write_record

COLUMNS = (
    "top1",
    "kl",
    "ppl_ratio",
    "greedy_match",
    "tokens_per_query",
    "share_of_pairs",
    "needle",
    "needle_of_dense",
    "ruler",
    "ruler_of_dense",
)
NEEDLES, TASKS = "needles_by_length_and_depth", "ruler_by_task_and_length"
PARTS = {
    "texts": ("texts", ("texts", *COLUMNS[:6]), None),
    **{
        part: (
            f"num_{part}_questions",
            (part, f"{part}_of_dense", f"num_{part}_questions", f"{part}_standard_error"),
            details,
        )
        for part, details in (("needle", NEEDLES), ("ruler", TASKS))
    },
}  # of a row: how many samples it has, its columns, and where its details are
PANELS_ABREAST = 7
HEAT_MAP = Path(__file__).parents[1] / "docs" / "quality-needles.png"
Key = tuple[str, int, int]  # part, length, seed


class Cell(Protocol):
    """What a measured cell has; see `quality.Cell`."""

    part: str
    settings: str
    length: int
    seed: int
    scores: dict[str, float]
    continued: list[int]
    use: AttentionUse
    commit: str


def report(cells: Sequence[Any], checks: dict[str, bool], settings: dict[str, Any]) -> None:
    """Print the table, write the record and the heat map; what the record before has more of stays."""
    by_settings: dict[str, dict[Key, Any]] = defaultdict(dict)
    for cell in cells:
        by_settings[cell.settings][cell.part, cell.length, cell.seed] = cell
    measured = {
        "table": {name: _row(by_settings, name) for name in settings},
        NEEDLES: {name: _needles(by_settings[name]) for name in settings},
        TASKS: {name: _ruler(by_settings[name]) for name in settings},
    }
    path = RESULTS / "quality.json"
    results = with_earlier(measured, settings, json.loads(path.read_text()) if path.exists() else None)
    print(" | ".join(["settings", *COLUMNS]))
    for name, row in results["table"].items():
        print(" | ".join([name, *(_shown(row[column]) for column in COLUMNS)]))
    write_record(
        "quality",
        settings=settings,
        gate={"passed": all(checks.values()), "checks": checks},
        results={**results, "cells_by_commit": dict(Counter(cell.commit for cell in cells))},
    )
    heat_map(results[NEEDLES], HEAT_MAP)  # last: the record says what changed before


def with_earlier(
    measured: dict[str, dict[str, Any]], settings: dict[str, Any], record: dict[str, Any] | None
) -> dict[str, dict[str, Any]]:
    """What was measured, but for parts of rows of which `record`, with the same settings, has more samples.

    `kept_from` names the commit at which each of those was reported. Rows without any sample are left out.
    """
    results: dict[str, dict[str, Any]] = {**{part: {} for part in measured}, "kept_from": {}}
    for name in settings:
        found = {part: own[name] for part, own in measured.items()}
        kept = {}
        if record and name in record["results"]["table"] and _same(record["settings"][name], settings[name]):
            before = {part: record["results"][part][name] for part in measured}
            for part, (count, columns, details) in PARTS.items():
                if before["table"][count] > found["table"][count]:
                    found["table"] = found["table"] | {column: before["table"][column] for column in columns}
                    found |= {details: before[details]} if details else {}
                    reported = record["results"].get("kept_from", {}).get(name, {})
                    kept[part] = reported.get(part, record["commit"])
        if any(found["table"][count] for count, _, _ in PARTS.values()):
            for part, own in found.items():
                results[part][name] = own
        if kept:
            results["kept_from"][name] = kept
    return results


def _same(one: Any, other: Any) -> bool:
    """Of settings as records have them: one that an earlier record does not name has its default."""
    return _read(one) == _read(other)


def _read(settings: Any) -> SparseAttention | None:
    return msgspec.convert(settings, SparseAttention | None)


def heat_map(needles: dict[str, dict[str, dict[str, dict[str, float]]]], path: Path) -> None:
    """Share of needles found, one panel per settings: context length across, depth down; grey: none asked."""
    from matplotlib import pyplot

    panels = {name: found for name, found in needles.items() if found}
    if not panels:
        return
    columns = min(len(panels), PANELS_ABREAST)
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(1.8 * columns + 0.6, 3.0 * rows + 0.4), squeeze=False, sharey=True
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (name, found) in zip(axes.flat, panels.items(), strict=False):
        lengths = sorted(found, key=int)
        none = {"found": math.nan}
        grid = [[found[length].get(str(depth), none)["found"] for length in lengths] for depth in DEPTHS]
        axis.set_facecolor("lightgrey")
        axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set_xticks(range(len(lengths)), [f"{int(n) / 1024:.3g}K" for n in lengths], fontsize=7)
        axis.set_yticks(range(len(DEPTHS)), [f"{depth} %" for depth in DEPTHS], fontsize=7)
        axis.set_title(name, fontsize=8)
    figure.supxlabel("context, tokens", fontsize=8)
    figure.supylabel("depth of the needle", fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _row(by_settings: dict[str, dict[Key, Any]], name: str) -> dict[str, Any]:
    """Means over the cells that these settings and dense have, and how many samples those hold."""
    own, dense = by_settings[name], by_settings.get("dense", {})
    shared = sorted(own.keys() & dense.keys())
    texts = [key for key in shared if key[0] == "text"]
    ratios = [math.exp(own[key].scores["nll"] - dense[key].scores["nll"]) for key in texts]
    row: dict[str, Any] = {
        "texts": len(texts),
        "top1": _mean(own[key].scores["top1"] for key in texts),
        "kl": _mean(own[key].scores["kl"] for key in texts),
        "ppl_ratio": _mean(ratios),
        "greedy_match": _mean(_match(own[key].continued, dense[key].continued) for key in texts),
        "tokens_per_query": _mean(own[key].use.attended_tokens_per_query for key in texts),
        "share_of_pairs": _mean(own[key].use.share_of_pairs for key in texts),
    }
    for part, tasks in (("needle", ("needle",)), ("ruler", RULER)):
        keys = [key for key in shared if key[0] in tasks]
        if {key[0] for key in keys} != set(tasks):
            keys = []  # a mean over some of the tasks is another benchmark's
        scores, of_dense = (_by_task(found, keys) for found in (own, dense))
        row |= {
            part: _mean(fmean(task) for task in scores.values()),
            f"{part}_of_dense": _mean(fmean(task) for task in of_dense.values()),
            f"num_{part}_questions": sum(map(len, scores.values())),
            f"{part}_standard_error": _standard_error(list(scores.values())),
        }
    return row


def _by_task(found: dict[Key, Any], keys: Sequence[Key]) -> dict[tuple[str, int], list[float]]:
    """Scores of all questions of a task; RULER's tasks at each length by themselves, as RULER counts them."""
    scores: dict[tuple[str, int], list[float]] = defaultdict(list)
    for part, length, seed in keys:
        task = (part, length if part in RULER else 0)
        scores[task] += found[part, length, seed].scores.values()
    return scores


def _standard_error(tasks: Sequence[Sequence[float]]) -> float | None:
    """Of the mean of the tasks' means, as if each score from 0 to 1 were a coin's (the binomial error)."""
    if not tasks:
        return None
    variances = [fmean(scores) * (1 - fmean(scores)) / len(scores) for scores in tasks]
    return math.sqrt(sum(variances)) / len(tasks)


def _needles(own: dict[Key, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """By length and depth: the share found, and of how many asked there."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for key in sorted(key for key in own if key[0] == "needle"):
        for depth, hit in own[key].scores.items():
            found[str(key[1])][depth].append(hit)
    return {
        length: {
            depth: {"found": fmean(depths[depth]), "asked": len(depths[depth])}
            for depth in sorted(depths, key=int)
        }
        for length, depths in found.items()
    }


def _ruler(own: dict[Key, Any]) -> dict[str, dict[str, float]]:
    """By task and length: the mean score and how many questions."""
    found: dict[str, list[float]] = defaultdict(list)
    for key in sorted(key for key in own if key[0] in RULER):
        found[f"{key[0]} {key[1]}"] += own[key].scores.values()
    return {label: {"score": fmean(values), "questions": len(values)} for label, values in found.items()}


def _match(mine: Sequence[int], theirs: Sequence[int]) -> int:
    """Greedy tokens before the first difference."""
    return next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), len(theirs))


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return fmean(found) if found else None


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
