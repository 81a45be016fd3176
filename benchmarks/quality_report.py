"""Cells of the quality benchmark to one table, record and heat map, each beside dense on the same cells."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from kvrelay.sparse import AttentionUse
from quality_tasks import DEPTHS, RULER
from record import write_record

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
    """Print the table, write the record and the heat map. Settings without any cell are left out."""
    by_settings: dict[str, dict[Key, Any]] = defaultdict(dict)
    for cell in cells:
        by_settings[cell.settings][cell.part, cell.length, cell.seed] = cell
    names = [name for name in settings if by_settings[name]]
    results = {
        "table": {name: _row(by_settings, name) for name in names},
        "needles_by_length_and_depth": {name: _needles(by_settings[name]) for name in names},
        "ruler_by_task_and_length": {name: _ruler(by_settings[name]) for name in names},
        "cells_by_commit": dict(Counter(cell.commit for cell in cells)),
    }
    print(" | ".join(["settings", *COLUMNS]))
    for name, row in results["table"].items():
        print(" | ".join([name, *(_shown(row[column]) for column in COLUMNS)]))
    write_record(
        "quality",
        settings=settings,
        gate={"passed": all(checks.values()), "checks": checks},
        results=results,
    )
    heat_map(results["needles_by_length_and_depth"], HEAT_MAP)  # last: the record says what changed before


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
        if part == "ruler" and {key[:2] for key in keys} != _asked_of(dense):
            keys = []  # a mean over some of the tasks, or of their lengths, is another benchmark's
        scores, of_dense = (_by_task(found, keys) for found in (own, dense))
        row |= {
            part: _mean(fmean(task) for task in scores.values()),
            f"{part}_of_dense": _mean(fmean(task) for task in of_dense.values()),
            f"num_{part}_questions": sum(map(len, scores.values())),
            f"{part}_standard_error": _standard_error(list(scores.values())),
        }
    return row


def _asked_of(dense: dict[Key, Any]) -> set[tuple[str, int]]:
    """Every task of RULER at each length that dense was asked one at."""
    return {(task, length) for asked, length, _ in dense if asked in RULER for task in RULER}


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
