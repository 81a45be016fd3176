"""Reports as tables a person can read at a glance; docs/report.md explains every column."""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from kvrelay.metrics import Report
from kvrelay.outputs import RequestOutput

UNKNOWN = "–"


def phase_table(report: Report) -> Table:
    """Tokens, speed and energy by phase. The energy columns say whether they were measured or modelled."""
    label = energy_label(report.energy_source)
    table = _table(
        "What each phase did", "phase", "tokens", "busy s", "tokens/s", f"J {label}", f"tokens/J {label}"
    )
    for name, phase in report.phases.items():
        figures = (phase.busy_s, phase.tokens_per_s, phase.joules, phase.tokens_per_joule)
        table.add_row(name, str(phase.num_tokens), *(_number(figure) for figure in figures))
    table.add_row("idle", "", "", "", _number(report.idle_j), "", end_section=True)
    total = (report.window_s, report.output_tokens_per_s, report.total_j, report.output_tokens_per_joule)
    table.add_row("output, total", str(report.num_output_tokens), *(_number(figure) for figure in total))
    return table


def worker_table(report: Report) -> Table:
    """One row per worker process; the title says what computes the layers."""
    headings = ("worker", "pid", "device", "prefill s", "KV s", "decode s", "KV sent", "blocks")
    impls = dict.fromkeys(worker.model_impl for worker in report.workers)
    table = _table(f"Workers (layers by {', '.join(impls)})", *headings)
    for worker in report.workers:
        busy = (_number(worker.busy_s[phase]) for phase in ("prefill", "transfer", "decode"))
        sent = f"{worker.kv_bytes_written / 1e6:.1f} MB"
        blocks = f"{worker.peak_blocks}/{worker.num_blocks}"
        state = worker.worker_id if worker.is_alive else f"{worker.worker_id} (dead)"
        table.add_row(state, str(worker.pid), f"{worker.device} {worker.dtype}", *busy, sent, blocks)
    return table


def latency_table(outputs: Sequence[RequestOutput]) -> Table:
    """The ledger of each request, in milliseconds; rows in the outputs' order."""
    parts = ("queue", "prefill", "transfer_wait", "decode_queue", "first_decode", "decode")
    headings = ("#", "in", "out", "queue", "prefill", "wait", "queue 2", "1st step", "decode", "TTFT", "end")
    table = _table("Where each request's time went (ms)", *headings)
    for index, output in enumerate(outputs):
        timings = output.timings
        seconds = [getattr(timings, f"{part}_s") for part in parts] + [timings.ttft_s, timings.e2e_s]
        cells = [UNKNOWN if second is None else f"{second * 1e3:.0f}" for second in seconds]
        counts = (str(len(output.prompt_token_ids)), str(len(output.token_ids)))
        table.add_row(str(index + 1), *counts, *cells)
    return table


def _table(title: str, *headings: str) -> Table:
    """Text columns to the left, numbers to the right, narrow enough for 80 characters."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in headings:
        is_text = heading in ("phase", "worker", "device")
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=True)
    return table


def energy_label(source: str | None) -> str:
    """`modelled` for declared watts, `measured` for a meter, a dash when nobody knows."""
    if source is None:
        return UNKNOWN
    return "modelled" if source.startswith("model(") else "measured"


def _number(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
