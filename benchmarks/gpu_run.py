"""What a GPU run is made of: its setting, its findings, timing by events, random caches."""

import math
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import kvrelay_kernels as kk


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Heads, channels and device of the whole run."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    dry_run: bool


@dataclass(kw_only=True)
class Record:
    """What the run found: rows of figures, gates by name, failures by section, absent peers and why."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    gates: dict[str, bool] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    ceilings: dict[str, float] = field(default_factory=dict)

    def add(self, section: str, gate: str, **figures: Any) -> None:
        """Keep and print a row; a figure that compares is withheld while its gate is red."""
        passed = self.gates.get(gate, False)
        if not passed:
            figures = {name: value for name, value in figures.items() if not name.startswith("times_")}
        self.rows.append({"section": section, "gate": gate, "gate_passed": passed, **figures})
        shown = "  ".join(f"{name}={_short(value)}" for name, value in figures.items())
        print(f"{section:10} [{gate}: {'pass' if passed else 'FAIL'}]  {shown}", flush=True)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def milliseconds(run: Callable[[], object], setting: Setting, budget_ms: float = 300.0) -> float:
    """Median time of ``run``, after one warm-up, from as many repeats (1 to 20) as ``budget_ms`` holds."""
    run()
    if setting.dry_run:
        return math.nan
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    times: list[float] = []
    while len(times) < 20 and sum(times) < budget_ms:
        events[0].record()
        run()
        events[1].record()
        torch.cuda.synchronize()
        times.append(events[0].elapsed_time(events[1]))
    return sorted(times)[len(times) // 2]


def graph_milliseconds(run: Callable[[], object], setting: Setting) -> float:
    """Time of ``run`` replayed from a CUDA graph, 20 replays a sample."""
    run()
    if setting.dry_run:
        return math.nan
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return milliseconds(lambda: [graph.replay() for _ in range(20)], setting) / 20


def make_cache(lengths: list[int], setting: Setting) -> kk.PagedKV:
    """Random paged keys and values, pages shuffled."""
    pages = [-(-length // 64) for length in lengths]
    shape = (sum(pages), setting.num_kv_heads, 64, setting.head_dim)
    k_pages, v_pages = (torch.randn(shape, dtype=setting.dtype, device=setting.device) for _ in range(2))
    order = torch.randperm(sum(pages), device=setting.device).to(torch.int32)
    table = torch.zeros(len(lengths), max(pages), dtype=torch.int32, device=setting.device)
    for row, part in enumerate(order.split(pages)):
        table[row, : len(part)] = part
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=setting.device)
    return kk.PagedKV(k_pages=k_pages, v_pages=v_pages, block_table=table, seq_lens=seq_lens)


def make_queries(rows: int, setting: Setting) -> Tensor:
    shape = (rows, setting.num_q_heads, setting.head_dim)
    return torch.randn(shape, dtype=setting.dtype, device=setting.device)


def contiguous(kv: kk.PagedKV) -> tuple[Tensor, Tensor]:
    """Keys and values of sequence 0 as ``[1, num_kv_heads, tokens, head_dim]`` for SDPA."""
    tokens = int(kv.seq_lens[0])
    picked = kv.block_table[0, : -(-tokens // 64)].long()
    return tuple(  # type: ignore[return-value]
        pages[picked].transpose(0, 1).flatten(1, 2)[None, :, :tokens] for pages in (kv.k_pages, kv.v_pages)
    )


def chunk(tokens: int, setting: Setting) -> Tensor:
    return torch.tensor([0, tokens], dtype=torch.int32, device=setting.device)


def attempt(section: str, record: Record, run: Callable[[], Any]) -> Any:
    """Run a section; keep the reason if it fails, and go on."""
    try:
        return run()
    except Exception as error:  # noqa: BLE001 - a benchmark on a borrowed GPU reports and goes on
        record.failures[section] = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"{section}: FAILED", file=sys.stderr)
        traceback.print_exc()
        return None
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
