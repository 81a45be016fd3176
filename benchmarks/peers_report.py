"""What `peers.py` makes of its runs: medians by cell and server, ratios, and a plot. Knows no servers."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FIGURES = ("tokens_per_s", "ttft_ms", "tpot_ms", "itl_p99_ms")
LESS_IS_BETTER = ("ttft_ms", "tpot_ms", "itl_p99_ms")
OURS = "kvrelay"
Cells = dict[str, dict[str, dict[str, float]]]


def summary(runs: Sequence[dict[str, Any]]) -> Cells:
    """Cell → server → the median of each figure over its rounds, and how many rounds there were."""
    cells: Cells = {}
    for cell in sorted({run["cell"] for run in runs}, key=_order):
        cells[cell] = {}
        for name in dict.fromkeys(run["server"] for run in runs if run["cell"] == cell):
            rows = [run for run in runs if (run["cell"], run["server"]) == (cell, name)]
            medians = {key: statistics.median(row[key] for row in rows) for key in FIGURES}
            cells[cell][name] = {**medians, "rounds": len(rows)}
    return cells


def ratios(servers: dict[str, dict[str, float]]) -> dict[tuple[str, str], dict[str, float]]:
    """(ours, theirs) → how many times better ours is: above 1 is better, for every figure."""
    found = {}
    for ours in (name for name in servers if name.startswith(OURS)):
        for theirs in (name for name in servers if not name.startswith(OURS)):
            mine, other = servers[ours], servers[theirs]
            found[ours, theirs] = {
                key: other[key] / mine[key] if key in LESS_IS_BETTER else mine[key] / other[key]
                for key in FIGURES
            }
    return found


def print_ratios(cells: Cells) -> None:
    """Ratios first, then the medians they come from."""
    for cell, servers in cells.items():
        for (ours, theirs), row in ratios(servers).items():
            text = "  ".join(f"{key.removesuffix('_ms')} {value:.2f}x" for key, value in row.items())
            print(f"{cell:11} {ours} against {theirs}: {text}")
    for cell, servers in cells.items():
        for name, row in servers.items():
            print(f"{cell:11} {name:24} " + "  ".join(f"{key} {row[key]:.4g}" for key in FIGURES))


def write_plot(cells: Cells, path: Path) -> None:
    """Tokens/s and time to first token, one bar per server and cell. Needs matplotlib (the `plot` extra)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(name for servers in cells.values() for name in servers))
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    for axis, key, title in zip(
        axes, ("tokens_per_s", "ttft_ms"), ("output tokens/s", "time to first token (ms)"), strict=True
    ):
        width = 0.8 / len(names)
        for index, name in enumerate(names):
            places = [at + index * width for at, servers in enumerate(cells.values()) if name in servers]
            heights = [servers[name][key] for servers in cells.values() if name in servers]
            axis.bar(places, heights, width, label=name)
        axis.set_xticks([at + 0.4 - width / 2 for at in range(len(cells))], list(cells), fontsize=7)
        axis.set_title(title, fontsize=9)
    axes[1].set_yscale("log")
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _order(cell: str) -> tuple[int, ...]:
    prompt, _, rest = cell.partition("x")
    return (int(prompt), *map(int, rest.split("@")))
