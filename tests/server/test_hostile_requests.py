"""Requests meant to hurt: no 500, no hang, nothing large comes back, and every block comes home."""

import json
import logging
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
from test_endpoints import HI, assert_is_error

from kvrelay.metrics import Report
from kvrelay.server import plan
from kvrelay.server.writers import CompletionWriter
from tiny_server import Served, wait_for_blocks

LONG = {"prompt": "x", "max_tokens": 1000, "ignore_eos": True}


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=60) as client:
        yield client


def post(body: dict[str, Any], head: bytes = b"") -> bytes:
    content = json.dumps(body).encode()
    start = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n" + head
    return start + b"content-length: %d\r\n\r\n" % len(content) + content


def until(condition: Any, timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("v1/completions", {"prompt": "x", "stop": ["a"] * 100_000}, 400),
        ("v1/completions", {"prompt": "x", "stop": "a" * 1_000_000}, 400),
        ("v1/completions", {"prompt": "x", "model": "m" * 1_000_000}, 404),
        ("v1/completions", {"prompt": "x", "response_format": {"type": "a" * 1_000_000}}, 400),
        ("v1/chat/completions", {"messages": [{"role": "u", "content": [{"type": "t" * 1_000_000}]}]}, 400),
        ("v1/chat/completions", {"messages": HI * 4097}, 400),
        ("v1/completions", {"prompt": "x", "logit_bias": dict.fromkeys(map(str, range(2000)), 1)}, 400),
        ("detokenize", {"tokens": [3] * 1_000_000}, 400),
        ("tokenize", {"prompt": "x" * 1_000_000}, 400),
    ],
)
def test_what_is_too_much_is_refused_in_few_words(
    client: httpx.Client, path: str, body: dict[str, Any], status: int
) -> None:
    answer = client.post(f"/{path}", json=body)
    assert answer.status_code == status
    assert len(answer.content) < 1500
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "content",
    [
        b'{"prompt":"x","a":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
        b'{"prompt":"x","max_tokens":1' + b"0" * 5000 + b"}",
        b'{"prompt":"x","temperature":NaN}',
        b'{"prompt":"x","logit_bias":{"3":-1e999}}',
        b'{"prompt":"x","seed":' + str(2**63).encode() + b"}",
        b'{"prompt":"x","max_tokens":1e9}',
        b'{"prompt":"x","stop":"\\ud800"}',
        b'{"prompt":"x","stop_token_ids":[-1]}',
        b'{"prompt":[[]]}',
        b'{"prompt":[' + str(2**70).encode() + b"]}",
        b'{"prompt":[true]}',
        '{"prompt":"x"}'.encode("utf-16"),
        b"\x1f\x8b\x08\x00",
        b"null",
    ],
)
def test_what_makes_no_sense_is_a_400(client: httpx.Client, content: bytes) -> None:
    answer = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert len(answer.content) < 1500


def test_a_long_prompt_is_refused_before_its_tokens_are_looked_at(client: httpx.Client) -> None:
    answer = client.post("/v1/completions", json={"prompt": [*[3] * 1_000_000, -1]})
    assert_is_error(answer, 400, "prompt: it has 1000001 tokens", "prompt")


def test_log_probabilities_are_bounded_together(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two choices of 10 prompt tokens with 3 each, and of 5 tokens with 3 each, make 90."""
    body = {"prompt": "x" * 10, "n": 2, "echo": True, "logprobs": 2, "max_tokens": 5}
    monkeypatch.setattr(plan, "MAX_LOGPROB_ENTRIES", 90)
    assert client.post("/v1/completions", json=body).status_code == 200
    monkeypatch.setattr(plan, "MAX_LOGPROB_ENTRIES", 89)
    answer = client.post("/v1/completions", json=body)
    assert_is_error(answer, 400, "2 choices could have 90 in all; at most 89", "logprobs")
    chat = {"messages": HI, "n": 2, "logprobs": True, "max_tokens": 50}
    assert_is_error(client.post("/v1/chat/completions", json=chat), 400, "could have 100 in all", "logprobs")


def test_a_large_answer_is_written_beside_the_loop(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def spied(method: Any) -> Any:
        def spy(*given: Any) -> Any:
            threads.append(threading.get_ident())
            return method(*given)

        return spy

    monkeypatch.setattr(CompletionWriter, "whole", spied(CompletionWriter.whole))
    monkeypatch.setattr(CompletionWriter, "chunks", spied(CompletionWriter.chunks))
    large = {"prompt": "y" * 1010, "echo": True, "logprobs": 1, "max_tokens": 1}
    small = {"prompt": "y", "max_tokens": 1}
    for stream in (False, True):
        for body in (small, large):
            text = client.post("/v1/completions", json={**body, "stream": stream}).text
            assert "logprobs" in text
    (loop, whole, same_loop, chunk) = threads[:4]
    assert loop == same_loop
    assert loop not in (whole, chunk)


def test_an_internal_error_says_little_and_keeps_the_requests_id(
    client: httpx.Client, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Report:
        raise ValueError("a secret")

    monkeypatch.setattr(served.engine, "report", broken)
    answer = client.get("/v1/kvrelay/report", headers={"x-request-id": "mine"})
    assert_is_error(answer, 500, "internal error (ValueError)")
    assert "secret" not in answer.text
    assert answer.headers.get_list("x-request-id") == ["mine"]
    failed = client.post("/v1/completions", json={"prompt": ""}, headers={"x-request-id": "mine"})
    assert failed.headers.get_list("x-request-id") == ["mine"]


def test_requests_sent_ahead_are_answered_in_order(served: Served) -> None:
    bodies = [
        {"prompt": "x", "max_tokens": n, "ignore_eos": True, "stream": n % 2 == 0} for n in range(1, 21)
    ]
    sent = (
        b"".join(map(post, bodies)) + b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as connection:
        connection.sendall(sent)
        said = b"".join(iter(lambda: connection.recv(65536), b""))
    assert said.count(b"HTTP/1.1 200") == 21
    assert said.count(b"[DONE]") == 10
    wholes = [line for line in said.split(b"\r\n") if line.startswith(b'{"id"')]
    documents = [json.JSONDecoder().raw_decode(line.decode())[0] for line in wholes]
    counts = [document["usage"]["completion_tokens"] for document in documents]
    assert counts == list(range(1, 21, 2))
    assert said.endswith(b'{"status":"ok","reason":null}')


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", ["close", "reset"])
def test_who_leaves_takes_along_what_was_sent_ahead(
    served: Served, caplog: pytest.LogCaptureFixture, stream: bool, how: str
) -> None:
    """The first runs, two wait behind it on the connection: the first is aborted, they never begin."""
    until(lambda: not served.engine.in_flight())
    before = served.engine.report().num_requests
    with caplog.at_level(logging.ERROR, "uvicorn.error"):
        connection = socket.create_connection(("127.0.0.1", served.port), timeout=30)
        connection.sendall(post({**LONG, "stream": stream}) * 3)
        until(lambda: len(served.engine.in_flight()) == 1)
        if how == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
        until(lambda: not served.engine.in_flight())
        time.sleep(0.2)
    wait_for_blocks(served.engine)
    after = served.engine.report().num_requests
    assert (after["aborted"], after["finished"]) == (before["aborted"] + 1, before["finished"])
    assert not caplog.records, caplog.text


def test_who_leaves_at_any_moment_leaves_nothing(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    whole = post({**LONG, "stream": True, "n": 3})
    with caplog.at_level(logging.ERROR, "uvicorn.error"):
        for number in range(60):
            with socket.create_connection(("127.0.0.1", served.port), timeout=30) as connection:
                connection.sendall(whole[: len(whole) - number % 3 * 7])
                if number % 2:
                    time.sleep(0.001 * number)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        until(lambda: not served.engine.in_flight())
    wait_for_blocks(served.engine)
    assert not caplog.records, caplog.text
    assert httpx.post(f"{served.url}/v1/completions", json={"prompt": "x"}, timeout=30).status_code == 200


@pytest.mark.parametrize(
    "head",
    [
        b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}",
        b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        b"content-length: -1\r\n\r\n{}",
        b"content-length: 99999999999999999999999\r\n\r\n{}",
        b"transfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
        b"transfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\n{}\r\n0\r\n\r\n",
    ],
)
def test_a_body_of_doubtful_length_is_refused(served: Served, head: bytes) -> None:
    start = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        connection.sendall(start + head)
        said = b""
        with suppress(ConnectionResetError):
            said = b"".join(iter(lambda: connection.recv(65536), b""))
    assert said.startswith(b"HTTP/1.1 400")
