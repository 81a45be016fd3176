"""The tables a person reads: every cell under its heading, nothing cut at 80 characters."""

import time
from pathlib import Path

from rich.console import Console

from kvrelay.experiments.tables import latency_table, phase_table, worker_table
from tiny_engine import greedy, prompts, tiny_llm


def test_tables_fit_a_terminal_and_their_headings(tiny_directory: Path) -> None:
    with tiny_llm(tiny_directory, power_model="idle_w=5,busy_w=20") as llm:
        outputs = llm.generate(prompts(70, 130), greedy(4))
        time.sleep(0.3)  # the last heartbeats
        report = llm.report()
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in (latency_table(outputs), phase_table(report), worker_table(report)):
        assert all(len(column._cells) == table.row_count for column in table.columns)
        console.print(table)
    text = console.export_text()
    assert "…" not in text
    workers = {line.split()[0]: line.split() for line in text.splitlines() if "cpu" in line.split()}
    assert workers["prefill-0"][2:4] == ["cpu", "float32"]
    assert workers["prefill-0"][-1] in ("3/64", "5/64"), "one prompt after the other, or both at once"
    assert float(workers["decode-0"][4]) == 0.0, "decode workers prefill nothing"
    assert float(workers["decode-0"][6]) > 0.0
