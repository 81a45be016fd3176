"""Requests to an engine of this process, timed where the router delivers: for benchmarks that compare modes.

Knows the engine's own API and one clock (`time.perf_counter`). The HTTP client is `openai_client.py`.
"""

import json
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvrelay import LLM, SamplingParams
from kvrelay.experiments.record import Gate, make_record
from kvrelay.outputs import StreamEvent

TIMEOUT_S = 240.0


class Watch:
    """One request from its start: its tokens and when each came. Raises the request's error where waited."""

    def __init__(self, llm: LLM, prompt: list[int], params: SamplingParams) -> None:
        self.token_ids: list[int] = []
        self.token_s: list[float] = []
        self._error: Exception | None = None
        self._is_over = False
        self._changed = threading.Condition()
        self._llm = llm
        self.start_s = time.perf_counter()
        self._request_id = llm.engine.submit(llm.engine.prepare(prompt, params), self._on_event)

    def wait(self, num_tokens: int) -> None:
        """Until that many tokens have come. Raises `TimeoutError`, or what the request failed with."""
        self._wait_for(lambda: len(self.token_s) >= num_tokens)

    def wait_end(self) -> None:
        """Until the request has ended. Raises `TimeoutError`, or what the request failed with."""
        self._wait_for(lambda: self._is_over)

    def stop(self) -> None:
        """End the request from outside."""
        self._llm.engine.finish(self._request_id)

    def _wait_for(self, is_met: Any) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: is_met() or self._error is not None, TIMEOUT_S):
                raise TimeoutError(f"{len(self.token_s)} tokens of {self._request_id} in {TIMEOUT_S:g} s")
        if self._error is not None:
            raise self._error

    def _on_event(self, event: StreamEvent) -> None:
        now_s = time.perf_counter()
        with self._changed:
            self.token_ids += event.token_ids
            self.token_s += [now_s] * len(event.token_ids)
            self._error = event.error
            self._is_over = event.output is not None
            self._changed.notify_all()


def itl(streams: Sequence[Watch], from_s: float, until_s: float) -> dict[str, float]:
    """Inter-token latency of the tokens that came in that time, in ms, and how many came per second."""
    gaps = sorted(
        after - before
        for stream in streams
        for before, after in zip(stream.token_s, stream.token_s[1:], strict=False)
        if from_s < after <= until_s
    )
    assert gaps, "no stream made a token in that time"
    return {
        "itl_p50_ms": 1e3 * gaps[len(gaps) // 2],
        "itl_p99_ms": 1e3 * gaps[min(len(gaps) - 1, int(0.99 * len(gaps)))],
        "stream_tokens_per_s": len(gaps) / (until_s - from_s),
    }


def random_prompt(llm: LLM, num_tokens: int, seed: int) -> list[int]:
    """Token ids that share no beginning with any other seed's."""
    source = random.Random(seed)
    return [source.randrange(100, llm.engine.spec.vocab_size) for _ in range(num_tokens)]


def earlier_rounds(path: Path) -> list[dict[str, Any]]:
    """The rounds in the record of earlier calls. Raises `SystemExit` when they are of another commit."""
    return list(earlier_results(path)["rounds"])


def earlier_results(path: Path) -> dict[str, Any]:
    """The results of earlier calls at this commit. Raises `SystemExit` when there are none, or of another."""
    if not path.exists():
        raise SystemExit(f"--add: {path} does not exist yet")
    record = json.loads(path.read_text())
    commit = make_record("", {}, Gate(checks={}), {})["commit"]
    if record["commit"] != commit:
        raise SystemExit(f"--add: {path} is of commit {record['commit']}, this is {commit}")
    results: dict[str, Any] = record["results"]
    return results
