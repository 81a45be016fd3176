"""One streaming client for every server that speaks `POST /v1/completions`, with one clock.

Standard library only: a thread and a connection per request in flight, so that the client costs every server
the same few microseconds a token. Knows nothing of which server it talks to.
"""

import http.client
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class Target:
    """A server: its address, the model's name there, and what its requests carry beside the common fields."""

    name: str
    url: str
    model: str
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request as the client saw it; times in seconds of `time.perf_counter`, one per piece of text."""

    prompt: int
    start_s: float
    end_s: float
    piece_s: tuple[float, ...]
    text: str
    num_prompt_tokens: int
    num_tokens: int

    @property
    def ttft_s(self) -> float:
        """From sending the request to the first piece of text."""
        return self.piece_s[0] - self.start_s

    @property
    def gaps_s(self) -> list[float]:
        """Between pieces of text: the inter-token latencies, where a piece is a token."""
        return [after - before for before, after in zip(self.piece_s, self.piece_s[1:], strict=False)]


class ServerError(RuntimeError):
    """The server refused a request or ended it with an error; the message is the server's.

    `status` is that of the response, `retry_after_s` what a refusal asked for, None without.
    """

    def __init__(self, message: str, status: int = 200, retry_after: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = None if retry_after is None else float(retry_after)


def complete(target: Target, prompt: str | list[int], max_tokens: int, index: int = 0) -> Exchange:
    """Stream one greedy completion of exactly `max_tokens` tokens; `index` is the caller's number for it.

    Raises `ServerError` or `OSError`.
    """
    body = {
        "model": target.model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **target.extra,
    }
    address = urlsplit(target.url)
    connection = http.client.HTTPConnection(address.hostname or "127.0.0.1", address.port, timeout=600)
    start_s = time.perf_counter()
    try:
        connection.request("POST", f"{address.path}/v1/completions", json.dumps(body), _HEADERS)
        response = connection.getresponse()
        if response.status != 200:
            answer = response.read(2000).decode(errors="replace")
            message = f"{target.name} answered {response.status}: {answer}"
            raise ServerError(message, response.status, response.getheader("retry-after"))
        return _read(target, response, index, start_s)
    finally:
        connection.close()


_HEADERS = {"Content-Type": "application/json", "Accept": "text/event-stream"}


def _read(target: Target, response: http.client.HTTPResponse, index: int, start_s: float) -> Exchange:
    times: list[float] = []
    pieces: list[str] = []
    usage: dict[str, int] | None = None
    for line in response:
        now_s = time.perf_counter()
        if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
            continue
        event = json.loads(line[5:])
        if event.get("error"):
            raise ServerError(f"{target.name} ended the stream with {event['error']}")
        usage = event.get("usage") or usage
        for choice in event.get("choices", []):
            if choice.get("text"):
                times.append(now_s)
                pieces.append(choice["text"])
    if usage is None or not times:
        raise ServerError(f"{target.name}: the stream ended with {len(times)} pieces of text, usage {usage}")
    num_prompt, num_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    end_s = time.perf_counter()
    return Exchange(index, start_s, end_s, tuple(times), "".join(pieces), num_prompt, num_tokens)


def closed_loop(
    target: Target, prompts: Sequence[str], max_tokens: int, concurrency: int
) -> tuple[list[Exchange], float]:
    """Keep `concurrency` requests in flight until every prompt is done: exchanges in order, seconds it took.

    Raises the error of the first request that had one; those that have not begun by then do not.
    """
    pool = ThreadPoolExecutor(concurrency)
    start_s = time.perf_counter()
    try:
        asked = [pool.submit(complete, target, text, max_tokens, n) for n, text in enumerate(prompts)]
        return [one.result() for one in asked], time.perf_counter() - start_s
    finally:
        pool.shutdown(cancel_futures=True)
