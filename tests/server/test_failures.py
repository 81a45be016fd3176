"""What a client sees when the engine fails, is late, or goes; and pieces of one moment joined."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from test_endpoints import assert_is_error

from kvrelay.errors import KVRelayError, WorkerFailed
from kvrelay.metrics import Report
from kvrelay.outputs import StreamEvent
from kvrelay.server import gate
from kvrelay.server.streaming import _merged
from kvrelay.types import RequestId, TokenLogprobs
from tiny_server import Served, tiny_server

LONG = {"prompt": "x", "max_tokens": 1000, "ignore_eos": True, "stream": True}


def post(served: Served, body: dict[str, Any], path: str = "v1/completions") -> httpx.Response:
    return httpx.post(f"{served.url}/{path}", json=body, timeout=60)


def test_a_failure_on_the_way_is_an_event_before_the_end(served: Served) -> None:
    with httpx.stream("POST", f"{served.url}/v1/completions", json=LONG, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        (running,) = served.engine.in_flight()

        def fail(now_s: float) -> None:
            served.engine._runtime.router.fail(running.request_id, WorkerFailed("it broke"), now_s)

        served.engine._runtime.call(fail).result()
        rest = [line for line in lines if line]
    assert stream.status_code == 200
    assert rest[-1] == "data: [DONE]"
    error = json.loads(rest[-2].removeprefix("data: "))["error"]
    assert (error["message"], error["type"]) == ("it broke", "server_error")


def test_who_waits_too_long_is_told_so(tiny_directory: Path) -> None:
    with tiny_server(tiny_directory, max_num_seqs=1, queue_timeout_s=0.3, verify_kv=False) as served:
        with httpx.stream("POST", f"{served.url}/v1/completions", json=LONG, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            late = post(served, {"prompt": "x"})
        assert_is_error(late, 503, "had not begun")
        assert late.json()["error"]["code"] == "deadline_exceeded"


def test_a_server_on_its_way_out_says_so(tiny_directory: Path) -> None:
    with tiny_server(tiny_directory) as served:
        draining = served.server._service.draining
        draining.set()
        assert_is_error(post(served, {"prompt": "x"}), 503, "shutting down")
        ready = httpx.get(f"{served.url}/ready")
        assert (ready.status_code, ready.json()["reason"]) == (503, "the server is shutting down")
        draining.clear()
        served.engine.close()
        gone = post(served, {"prompt": "x"})
        assert_is_error(gone, 503, "closed")
        assert gone.json()["error"]["code"] == "shutting_down"
        assert httpx.get(f"{served.url}/ready").json()["reason"] == "the engine is closed"
        assert httpx.get(f"{served.url}/health").status_code == 200


def test_a_server_whose_router_failed_is_not_ready(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def failed() -> Report:
        raise KVRelayError("the router failed: ValueError: x")

    monkeypatch.setattr(served.engine, "report", failed)
    ready = httpx.get(f"{served.url}/ready")
    assert (ready.status_code, ready.json()["reason"]) == (503, "the router failed: ValueError: x")
    assert httpx.get(f"{served.url}/v1/kvrelay/live").text == ""


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_without_a_role_it_is_not_ready(served: Served, monkeypatch: pytest.MonkeyPatch, role: str) -> None:
    report = served.engine.report()
    workers = [msgspec.structs.replace(w, is_alive=w.role != role) for w in report.workers]
    monkeypatch.setattr(served.engine, "report", lambda: msgspec.structs.replace(report, workers=workers))
    ready = httpx.get(f"{served.url}/ready")
    assert (ready.status_code, ready.json()["reason"]) == (503, f"no {role} worker is alive")


def test_without_a_living_worker_a_request_is_refused_with_the_reason(tiny_directory: Path) -> None:
    with tiny_server(tiny_directory, transport="shm") as served:
        with httpx.stream("POST", f"{served.url}/v1/completions", json=LONG, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            os.kill(next(w.pid for w in served.engine.report().workers if w.role == "decode"), signal.SIGKILL)
            *_, last, done = [line for line in lines if line]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert (done, error["code"]) == ("data: [DONE]", "no_worker")
        assert (
            "no decode worker is alive; the last attempt: decode-0 died: killed by SIGKILL"
            in error["message"]
        )
        refused = post(served, {"prompt": "x"})
        assert_is_error(refused, 503, "no decode worker is alive")
        assert refused.json()["error"]["code"] == "no_worker"


def test_the_models_own_name_is_taken_too(served: Served, tiny_directory: Path) -> None:
    assert post(served, {"prompt": "x", "max_tokens": 1, "model": str(tiny_directory)}).status_code == 200


def test_offsets_count_characters_not_bytes(served: Served) -> None:
    body = {"prompt": "hé!", "echo": True, "logprobs": 0, "max_tokens": 0}
    found = post(served, body).json()["choices"][0]["logprobs"]
    assert found["text_offset"] == [0, 1, 1, 2]
    assert found["tokens"] == ["h", "bytes:\\xc3", "bytes:\\xa9", "!"]


def test_special_tokens_take_no_room_in_the_text(served: Served) -> None:
    special = next(token for token in range(258) if served.engine.tokenizer.is_special(token))
    first, last = served.engine.tokenizer.encode("hi")
    body = {"prompt": [first, special, last], "echo": True, "logprobs": 0, "max_tokens": 0}
    choice = post(served, body).json()["choices"][0]
    assert choice["text"] == "hi"
    assert choice["logprobs"]["text_offset"] == [0, 1, 1]


def test_a_tokens_own_log_probability_is_among_the_alternatives(served: Served) -> None:
    body = {"prompt": "x", "logprobs": 1, "max_tokens": 8, "seed": 1, "temperature": 5.0, "ignore_eos": True}
    found = post(served, body).json()["choices"][0]["logprobs"]
    assert any(len(top) == 2 for top in found["top_logprobs"]), "hot enough not always to take the likeliest"
    for token, own, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        assert top[token] == own


@pytest.mark.parametrize("path", ["v1/completions", "v1/chat/completions"])
def test_a_requests_clock_runs_while_it_is_tokenised(
    served: Served, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    encode = served.engine.tokenizer.encode

    def slow(*arguments: Any) -> list[int]:
        time.sleep(0.2)
        return encode(*arguments)

    monkeypatch.setattr(served.engine.tokenizer, "encode", slow)
    body = {"prompt": "x", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "kvrelay": True}
    timings = post(served, body, path).json()["kvrelay"]["timings"]
    assert timings["ttft_s"] > 0.2


def test_the_completion_limit_has_the_newer_name_first(served: Served) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 9, "ignore_eos": True}
    answer = post(served, {**body, "max_completion_tokens": 3}, "v1/chat/completions").json()
    assert answer["usage"]["completion_tokens"] == 3


def test_without_a_limit_an_answer_ends_where_the_context_does(served: Served) -> None:
    """OpenAI's default of 16 tokens is no wish: 1,020 of 1,024 leave four."""
    answer = post(served, {"prompt": "x" * 1020, "ignore_eos": True}).json()
    assert answer["usage"]["completion_tokens"] == 4
    assert answer["choices"][0]["finish_reason"] == "length"


def test_pieces_of_one_moment_are_one_chunk_for_each_choice() -> None:
    def event(number: int, text: str) -> StreamEvent:
        return StreamEvent(
            request_id=RequestId(f"r{number}"),
            text=text,
            token_ids=[ord(text)],
            logprobs=[TokenLogprobs(ord(text), -1.0)],
            prompt_logprobs=[None] if text == "a" else None,
        )

    merged = dict(_merged([(0, event(0, "a")), (1, event(1, "x")), (0, event(0, "b"))]))
    assert list(merged) == [0, 1]
    joined = merged[0]
    assert (joined.text, joined.token_ids, joined.prompt_logprobs) == ("ab", [97, 98], [None])
    assert [entry.token_id for entry in joined.logprobs] == [97, 98]
    assert merged[1].text == "x"


def test_keys_are_compared_in_constant_time(tiny_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bytes, bytes]] = []
    compare = gate.hmac.compare_digest

    def spy(given: bytes, own: bytes) -> bool:
        seen.append((given, own))
        return compare(given, own)

    monkeypatch.setattr(gate.hmac, "compare_digest", spy)
    with tiny_server(tiny_directory, {"api_key": "right"}) as served:
        begin_s = time.monotonic()
        wrong = httpx.get(f"{served.url}/v1/models", headers={"authorization": "Bearer wrong"})
        assert wrong.status_code == 401
        assert time.monotonic() - begin_s < 5
    assert seen == [(b"wrong", b"right")]
