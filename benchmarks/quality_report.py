"""Cells of the quality benchmark to one table, one record and one heat map: what all settings have."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from kvrelay.sparse import AttentionUse
from quality_tasks import DEPTHS, RULER
from record import RESULTS, write_record

COLUMNS = ("needle", "ruler", "ppl_ratio", "top1", "kl", "greedy_match", "share_of_pairs")
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


def report(cells: Sequence[Any], checks: dict[str, bool], settings: dict[str, Any]) -> None:
    """Print the table, write the heat map and the record."""
    by_settings: dict[str, dict[Key, Any]] = defaultdict(dict)
    for cell in cells:
        by_settings[cell.settings][cell.part, cell.length, cell.seed] = cell
    rows = {name: _row(by_settings, name) for name in settings if name in by_settings}
    print(" | ".join(["settings", *COLUMNS]))
    for name, row in rows.items():
        print(" | ".join([name, *(_shown(row[column]) for column in COLUMNS)]))
    needles = {name: _needles(_shared(by_settings, "needle"), by_settings[name]) for name in rows}
    heat_map(needles, RESULTS / "quality-needles.png")
    write_record(
        "quality",
        settings=settings,
        gate={"passed": all(checks.values()), "checks": checks},
        results={
            "table": rows,
            "needles_by_length_and_depth": needles,
            "ruler_by_task_and_length": {name: _ruler(by_settings, name) for name in rows},
            "num_samples": _num_samples(by_settings),
        },
    )


def heat_map(needles: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """Share of needles found, one panel per settings: context length across, depth down."""
    from matplotlib import pyplot

    panels = {name: found for name, found in needles.items() if found}
    if not panels:
        return
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(2.1 * len(panels), 3.6), squeeze=False, sharey=True
    )
    for axis, (name, found) in zip(axes[0], panels.items(), strict=True):
        lengths = sorted(found, key=int)
        grid = [[found[length][str(depth)] for length in lengths] for depth in DEPTHS]
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


def _row(by_settings: dict[str, dict[Key, Any]], name: str) -> dict[str, float | None]:
    """Means over the cells that every settings (of those that run the part) has."""
    own, dense = by_settings[name], by_settings.get("dense", {})
    needles = [fmean(own[key].scores.values()) for key in _shared(by_settings, "needle")]
    texts = [key for key in _shared(by_settings, "text") if key in own]
    ruler = [fmean(own[key].scores.values()) for key in _shared_ruler(by_settings) if key in own]
    ratios = [2.718281828459045 ** (own[k].scores["nll"] - dense[k].scores["nll"]) for k in texts]
    return {
        "needle": _mean(needles),
        "ruler": _mean(ruler) if len(ruler) == len(_shared_ruler(by_settings)) else None,
        "ppl_ratio": _mean(ratios),
        "top1": _mean(own[key].scores["top1"] for key in texts),
        "kl": _mean(own[key].scores["kl"] for key in texts),
        "greedy_match": _mean(_match(own[key].continued, dense[key].continued) for key in texts),
        "share_of_pairs": _mean(own[key].use.share_of_pairs for key in texts),
    }


def _shared(by_settings: dict[str, dict[Key, Any]], part: str) -> list[Key]:
    """Cells of a part that all settings have."""
    sets = [{key for key in cells if key[0] == part} for cells in by_settings.values()]
    return sorted(set.intersection(*sets)) if sets else []


def _shared_ruler(by_settings: dict[str, dict[Key, Any]]) -> list[Key]:
    sets = [{key for key in cells if key[0] in RULER} for cells in by_settings.values()]
    return sorted(set.intersection(*(found for found in sets if found))) if any(sets) else []


def _needles(keys: Iterable[Key], own: dict[Key, Any]) -> dict[str, dict[str, float]]:
    """Share found by length, then depth."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for key in keys:
        for depth, hit in own[key].scores.items():
            found[str(key[1])][depth].append(hit)
    return {n: {depth: fmean(hits) for depth, hits in depths.items()} for n, depths in found.items()}


def _ruler(by_settings: dict[str, dict[Key, Any]], name: str) -> dict[str, float]:
    found: dict[str, list[float]] = defaultdict(list)
    for key in _shared_ruler(by_settings):
        if key in by_settings[name]:
            found[f"{key[0]} {key[1]}"].append(fmean(by_settings[name][key].scores.values()))
    return {label: fmean(values) for label, values in found.items()}


def _num_samples(by_settings: dict[str, dict[Key, Any]]) -> dict[str, int]:
    """Questions, tokens or texts behind a row."""
    dense = by_settings.get("dense", {})
    return {
        "needles": sum(len(dense[key].scores) for key in _shared(by_settings, "needle")),
        "ruler_questions": sum(len(dense[key].scores) for key in _shared_ruler(by_settings)),
        "texts": len(_shared(by_settings, "text")),
    }


def _match(mine: Sequence[int], theirs: Sequence[int]) -> int:
    """Greedy tokens before the first difference."""
    return next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), len(theirs))


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return fmean(found) if found else None


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
