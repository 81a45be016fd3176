"""Requests that are not what a route expects: odd methods, heads that make no sense, bodies nobody reads."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import msgspec
import pytest

from kvrelay.server import body
from kvrelay.server.responses import ErrorResponse
from tiny_server import Served, tiny_server

MOST = 50_000  # bytes of a body
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def small(tiny_directory: Path) -> Iterator[Served]:
    """A server with a key that takes small bodies only."""
    with tiny_server(tiny_directory, {"max_body_bytes": MOST, "api_key": "k"}) as served:
        yield served


@pytest.fixture
def client(small: Served) -> Iterator[httpx.Client]:
    headers = {"authorization": "Bearer k"}
    with httpx.Client(base_url=small.url, timeout=30, headers=headers) as client:
        yield client


def assert_is_refused(answer: httpx.Response, status: int) -> None:
    assert answer.status_code == status, answer.text
    assert msgspec.json.decode(answer.content, type=ErrorResponse).error.message
    assert answer.headers["x-request-id"]


def pieces(num_bytes: int) -> Iterator[bytes]:
    for _ in range(num_bytes // 65536):
        yield b"x" * 65536


@pytest.mark.parametrize("is_length_told", [True, False])
@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/v1/completions", JSON, 413),
        ("/v1/completions", JSON | {"authorization": "Bearer wrong"}, 401),
        ("/v1/completions", {"content-type": "text/plain"}, 415),
        ("/v1/completions", JSON | {"x-request-id": "x" * 300}, 400),
        ("/nowhere", JSON, 404),
        ("/v1/models", JSON, 405),
    ],
)
def test_who_sends_far_too_much_still_gets_the_answer(
    client: httpx.Client, path: str, headers: dict[str, str], status: int, is_length_told: bool
) -> None:
    size = 256 * 65536
    sent = {**headers, "content-length": str(size)} if is_length_told else headers
    if is_length_told and status in (404, 405, 415):
        status = 413  # the length is looked at first
    answer = client.post(path, headers=sent, content=pieces(size))
    assert_is_refused(answer, status)
    assert answer.headers["connection"] == "close"
    assert client.get("/v1/models").status_code == 200


@pytest.mark.parametrize("length", [b"content-length: 100000000000", b"transfer-encoding: chunked"])
@pytest.mark.parametrize("key", [b"k", b"wrong"])
def test_a_body_without_end_is_left_unread(
    small: Served, monkeypatch: pytest.MonkeyPatch, length: bytes, key: bytes
) -> None:
    """The whole answer comes at once, the end of the connection soon after, however much is still sent."""
    monkeypatch.setattr(body, "LINGER_S", 0.4)
    monkeypatch.setattr(body, "LINGER_BYTES", 2**40)
    head = b"POST /v1/completions HTTP/1.1\r\ncontent-type: application/json\r\nauthorization: Bearer " + key
    chunk = b"8000\r\n" + b"x" * 0x8000 + b"\r\n" if b"chunked" in length else b"x" * 0x8000
    begin_s, answered_s, said = time.monotonic(), 0.0, b""
    with socket.create_connection(("127.0.0.1", small.port), timeout=10) as connection:
        connection.sendall(head + b"\r\n" + length + b"\r\n\r\n")
        with suppress(ConnectionError):
            while time.monotonic() - begin_s < 10:
                connection.sendall(chunk)
                connection.setblocking(False)
                with suppress(BlockingIOError):
                    said += connection.recv(65536)
                connection.settimeout(10)
                if not answered_s and said.endswith(b"}}"):
                    answered_s = time.monotonic() - begin_s
    ended_s = time.monotonic() - begin_s
    assert said.startswith(b"HTTP/1.1 413" if key == b"k" else b"HTTP/1.1 401")
    assert b"connection: close" in said
    assert 0 < answered_s < 0.4
    assert 0.3 < ended_s < 3


def test_of_a_body_that_is_refused_only_so_much_is_read(
    small: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body, "LINGER_S", 60.0)
    monkeypatch.setattr(body, "LINGER_BYTES", 100_000)
    num_sent = 0
    with socket.create_connection(("127.0.0.1", small.port), timeout=10) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\ncontent-length: 100000000000\r\n\r\n")
        with suppress(ConnectionError):
            while num_sent < 10**9:
                num_sent += connection.send(b"x" * 65536)
    assert num_sent < 10**8, "the rest was in the sockets' buffers"


def test_a_body_that_turns_out_bad_after_the_answer_gets_no_other(small: Served) -> None:
    with socket.create_connection(("127.0.0.1", small.port), timeout=5) as connection:
        connection.sendall(b"POST /nowhere HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n")
        said = connection.recv(65536)
        connection.sendall(b"not a length\r\n")
        with suppress(ConnectionResetError):
            said += b"".join(iter(lambda: connection.recv(65536), b""))
    assert said.startswith(b"HTTP/1.1 401")
    assert said.count(b"HTTP/1.1") == 1


def test_a_body_that_is_not_sent_ends_the_connection_too(
    small: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`Expect: 100-continue`: the client is not asked to go on, and not waited for."""
    monkeypatch.setattr(body, "LINGER_S", 0.2)
    head = b"POST /v1/completions HTTP/1.1\r\nexpect: 100-continue\r\ncontent-length: 9\r\n\r\n"
    with socket.create_connection(("127.0.0.1", small.port), timeout=5) as connection:
        connection.sendall(head)
        said = b"".join(iter(lambda: connection.recv(65536), b""))
    assert said.startswith(b"HTTP/1.1 401")
    assert said.count(b"HTTP/1.1") == 1


def test_a_body_that_was_read_leaves_the_connection_open(client: httpx.Client) -> None:
    answer = client.post("/v1/completions", json={"prompt": ""})
    assert_is_refused(answer, 400)
    assert "connection" not in answer.headers
    assert "connection" not in client.get("/v1/models").headers, "nor is one missed that never was"


def test_every_route_refuses_other_methods(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert len(paths) >= 14
    for path, operations in paths.items():
        for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"} - {
            *map(str.upper, operations)
        }:
            answer = client.request(method, path)
            assert_is_refused(answer, 405)
            assert set(answer.headers["allow"].split(", ")) & {*map(str.upper, operations)}
    head = client.head("/v1/completions")
    assert (head.status_code, head.content) == (405, b"")


@pytest.mark.parametrize(
    "query", ["?", "?x", "?x=%ff%00", "?" + "a=1&" * 5000, "?{}[]|\\^`", "?stream=true#x"]
)
def test_queries_change_nothing(client: httpx.Client, query: str) -> None:
    asked = client.build_request("POST", "/v1/completions", json={"prompt": "x", "max_tokens": 1})
    asked.url = httpx.URL(client.base_url.join("/v1/completions"), query=query[1:].partition("#")[0].encode())
    answer = client.send(asked)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"


def raw(served: Served, data: bytes) -> bytes:
    """Everything the server says to these bytes until it closes."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        connection.sendall(data)
        with suppress(ConnectionResetError):
            return b"".join(iter(lambda: connection.recv(65536), b""))
    return b""


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET /health HTTP/1.1\r\nname : x\r\n\r\n",
        b"GET /health HTTP/1.1\r\n: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nx: a\0b\r\n\r\n",
        b"GET /health HTTP/1.1\r\nx: a\r\n b\r\n\r\n",
        b"GET /health HTTP/9.9\r\n\r\n",
        b"GET health HTTP/1.1\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
        b"BREW /health HTTP/1.1\r\n\r\n",
        b"get /health HTTP/1.1\r\n\r\n",
        b"CONNECT a:1 HTTP/1.1\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n{}",
        b"POST /tokenize HTTP/1.1\r\ntransfer-encoding: gzip\r\n\r\n{}",
        b"\0\0\0\0\r\n\r\n",
    ],
)
def test_a_head_that_makes_no_sense_is_a_400(served: Served, head: bytes) -> None:
    said = raw(served, head)
    assert said.startswith(b"HTTP/1.1 400"), said
    assert msgspec.json.decode(said.partition(b"\r\n\r\n")[2], type=ErrorResponse).error.message


def test_nothing_stands_within_the_answer_to_another_request(served: Served) -> None:
    """Garbage behind a request whose stream runs: the connection ends, and the stream with it."""
    content = json.dumps({"prompt": "x", "max_tokens": 1000, "stream": True, "ignore_eos": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        connection.sendall(head % len(content) + content)
        said = connection.recv(65536)
        connection.sendall(b"garbage\r\n\r\n")
        with suppress(ConnectionResetError):
            said += b"".join(iter(lambda: connection.recv(65536), b""))
    assert said.startswith(b"HTTP/1.1 200")
    assert b"HTTP/1.1 400" not in said
    assert b"[DONE]" not in said


@pytest.mark.parametrize(
    ("host", "status"),
    [
        (b"localhost", 200),
        (b"LocalHost:8000", 200),
        (b"127.0.0.1:1", 200),
        (b"127.1.2.3", 200),
        (b"[::1]:8000", 200),
        (b"example.org", 403),
        (b"127.0.0.1.example.org", 403),
        (b"localhost@example.org", 403),
        (b"example.org#localhost", 403),
        (b"192.168.1.2:8000", 403),
        (b"[::2]", 403),
        (b"[", 403),
        (b":80", 403),
        (b"\xff", 403),
    ],
)
def test_without_a_key_only_names_of_this_machine_are_answered(
    served: Served, small: Served, host: bytes, status: int
) -> None:
    """A page of `example.org` whose name is made to lead to 127.0.0.1 would be of the same origin."""
    head = b"GET /health HTTP/1.1\r\nhost: %s\r\nconnection: close\r\n\r\n" % host
    said = raw(served, head)
    assert int(said.split()[1]) == status, said
    if status == 403:
        error = msgspec.json.decode(said.partition(b"\r\n\r\n")[2], type=ErrorResponse).error
        assert (error.type, error.code) == ("permission_error", "host_not_allowed")
    assert raw(small, head).startswith(b"HTTP/1.1 200"), "a key is as good as a name"
    assert raw(served, b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200"), (
        "browsers always name one"
    )
