"""The main job on real prompts: one prefill worker, one decode worker, answers as they come, one report."""

import os
import statistics
import time
from typing import Any

import msgspec
from rich.console import Console

from kvrelay.experiments.record import Gate, make_record
from kvrelay.experiments.tables import energy_label, latency_table, phase_table, worker_table
from kvrelay.llm import LLM
from kvrelay.metrics import Report
from kvrelay.outputs import RequestOutput
from kvrelay.sampling_params import SamplingParams
from kvrelay.types import num_blocks

QUESTIONS = (
    "What is the capital of France?",
    "Name three primary colours.",
    "Why is the sky blue? Answer in one sentence.",
    "Write a haiku about the sea.",
    "What is 12 plus 30?",
    "Translate to French: good morning.",
    "Give one tip for staying healthy.",
    "Who wrote Romeo and Juliet?",
)


def run_demo(settings: dict[str, Any], max_tokens: int, console: Console) -> dict[str, Any]:
    """Answer the questions, show the tables, and return the record (see `experiments.record`).

    `settings` are those of `LLM`, the model among them.
    """
    with LLM(**settings) as llm:
        console.print(f"[bold]{settings['model']}[/] is loaded; {len(QUESTIONS)} questions go in together.")
        prompts = llm.render([[{"role": "user", "content": question}] for question in QUESTIONS])
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        outputs, clocks = _answer(llm, prompts, params, console)
        time.sleep(0.25)  # the workers' last heartbeats
        report = llm.report()
        gate = _gate(llm, report, outputs, clocks)
    for table in (latency_table(outputs), phase_table(report), worker_table(report)):
        console.print(table)
    label = energy_label(report.energy_source)
    console.print(
        f"energy {label}: {report.energy_source or 'unknown'}; {report.energy_note}", soft_wrap=True
    )
    return make_record("demo", {"max_tokens": max_tokens, **settings}, gate, _results(outputs, report))


def _answer(
    llm: LLM, prompts: list[Any], params: SamplingParams, console: Console
) -> tuple[list[RequestOutput], list[tuple[float, float]]]:
    """Stream all answers, printed in order; outputs, and the client's own (TTFT, end-to-end) seconds."""
    printer = _InOrder(console, len(prompts))
    outputs: dict[int, RequestOutput] = {}
    first_s: dict[int, float] = {}
    last_s: dict[int, float] = {}
    start_s = time.monotonic()
    for index, event in llm.stream_many(prompts, params):
        if event.error is not None:
            raise event.error
        if event.token_ids:
            first_s.setdefault(index, time.monotonic() - start_s)
        printer.add(index, event.text, len(event.token_ids), is_last=event.output is not None)
        if event.output is not None:
            outputs[index] = event.output
            last_s[index] = time.monotonic() - start_s
    order = range(len(prompts))
    return [outputs[index] for index in order], [(first_s[index], last_s[index]) for index in order]


class _InOrder:
    """Prints the first unfinished answer as it grows, then the next, with a line of progress between."""

    def __init__(self, console: Console, count: int) -> None:
        self._console, self._texts, self._finished = console, [""] * count, [False] * count
        self._current, self._printed, self._num_tokens = -1, 0, 0
        self._start_s = time.monotonic()
        self._advance()

    def add(self, index: int, text: str, num_tokens: int, *, is_last: bool) -> None:
        """Take a piece of one answer, and print what can be printed."""
        self._texts[index] += text
        self._finished[index] |= is_last
        self._num_tokens += num_tokens
        while self._current < len(self._texts):
            pending = self._texts[self._current][self._printed :]
            self._console.print(pending, end="", markup=False, highlight=False, soft_wrap=True)
            self._printed += len(pending)
            if not self._finished[self._current]:
                return
            self._advance()

    def _advance(self) -> None:
        if self._current >= 0:
            self._progress()
        self._current, self._printed = self._current + 1, 0
        if self._current < len(self._texts):
            self._console.print(f"[bold cyan]{QUESTIONS[self._current]}[/]")

    def _progress(self) -> None:
        seconds = time.monotonic() - self._start_s
        done = f"{sum(self._finished)} of {len(self._finished)} answers"
        speed = f"{self._num_tokens} tokens in {seconds:.1f} s, {self._num_tokens / seconds:.1f} tokens/s"
        self._console.print(f"\n[dim]  … so far {done}, {speed}[/]\n")


def _gate(llm: LLM, report: Report, outputs: list[RequestOutput], clocks: list[tuple[float, float]]) -> Gate:
    """What must be true for the figures to mean anything."""
    spec = llm.engine.spec
    item = {"float32": 4}.get(report.workers[0].dtype, 2)
    token_bytes = spec.num_layers * 2 * spec.num_kv_heads * spec.head_dim * item
    blocks = sum(num_blocks(len(output.prompt_token_ids) - 1) for output in outputs)
    pids = {worker.pid for worker in report.workers}
    parts = ("queue_s", "prefill_s", "transfer_wait_s", "decode_queue_s", "first_decode_s", "decode_s")
    ledgers = [(sum(getattr(o.timings, part) for part in parts), o.timings.e2e_s) for o in outputs]
    return Gate(
        checks={
            "every request finished": all(o.finish_reason in ("stop", "length") for o in outputs),
            "workers are processes of their own": os.getpid() not in pids
            and len(pids) == len(report.workers),
            "KV bytes moved are those of the prefilled blocks": llm.engine.config.is_colocated
            or report.kv_bytes_moved == blocks * 64 * token_bytes,
            "ledger parts sum to end-to-end time": all(abs(a - b) <= 0.01 * b for a, b in ledgers),
            "ledger agrees with the client's clock within 1 %": _median_error(outputs, clocks) <= 0.01,
            "the capital of France is Paris": "Paris" in outputs[0].text or len(outputs[0].token_ids) < 8,
        }
    )


def _median_error(outputs: list[RequestOutput], clocks: list[tuple[float, float]]) -> float:
    """Median relative difference of TTFT and end-to-end time from the client's clock."""
    pairs = [(output.timings, clock) for output, clock in zip(outputs, clocks, strict=True)]
    errors = [abs((timings.ttft_s or 0.0) / ttft_s - 1) for timings, (ttft_s, _) in pairs]
    errors += [abs(timings.e2e_s / e2e_s - 1) for timings, (_, e2e_s) in pairs]
    return statistics.median(errors)


def _results(outputs: list[RequestOutput], report: Report) -> dict[str, Any]:
    answers = [
        {
            "question": question,
            "text": output.text,
            "num_prompt_tokens": len(output.prompt_token_ids),
            "num_output_tokens": len(output.token_ids),
            "finish_reason": output.finish_reason,
            "timings": msgspec.to_builtins(output.timings),
            "energy": output.energy.to_dict(),
        }
        for question, output in zip(QUESTIONS, outputs, strict=True)
    ]
    return {"router_pid": os.getpid(), "answers": answers, "report": report.to_dict()}
